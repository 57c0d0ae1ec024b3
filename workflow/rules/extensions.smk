"""ModelOpt's CUDA extensions: compiled before any job needs them, and never by two at once."""


rule extension:
    """One of ModelOpt's CUDA extensions, or what the compiler had against it."""
    output:
        paths.extension("{extension}"),
    log:
        paths.log("extension", "{extension}"),
    benchmark:
        paths.benchmark("extension", "{extension}")
    conda:
        environment("cuda")
    threads: 2
    resources:
        # It only asks which GPU there is: here builds need not queue for it, elsewhere a node that
        # has one is needed. The executor is known once rules have been read.
        gpu=lambda wildcards: 1 if workflow.non_local_exec else 0,
        mem_mb=lambda wildcards, attempt: 8_000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        version=EXTENSIONS_VERSION,
    shell:
        PYTHON
        + " -m layersense extension {wildcards.extension:q}"
        + CACHE
        + " --out {output:q}"
        " > {log:q} 2>&1"
