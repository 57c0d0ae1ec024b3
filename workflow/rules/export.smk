"""Checkpoints to ship: one job for each scheme that its run exports."""


rule checkpoint:
    """Write the recipe of one scheme as a checkpoint, check it, and put it in place."""
    input:
        model=lambda wildcards: paths.model(CONFIG.runs[wildcards.run].model),
        database=lambda wildcards: paths.calibration(CONFIG.runs[wildcards.run].dataset),
        manifest=paths.manifest("{run}", "{scheme}"),
        verification=verification_of_run,
    output:
        update(paths.exported("{run}", "{scheme}")),
    log:
        paths.log("checkpoint", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("checkpoint", "{run}", "{scheme}")
    priority: longest_first
    conda:
        lambda wildcards: environment("cuda" if on_gpu(wildcards) else "cpu")
    threads: 4
    resources:
        gpu=gpus_of_run,
        # The weights as simulated wait in host memory for the check.
        mem_mb=lambda wildcards, input, attempt: job_resources.memory_mb(
            job_resources.model_size_mb(input.model),
            CONFIG.runs[wildcards.run].device,
            attempt,
        )
        + 2 * job_resources.model_size_mb(input.model) * attempt,
        runtime=lambda wildcards, input, attempt: job_resources.minutes(
            job_resources.model_size_mb(input.model), attempt
        ),
    params:
        version=f"export-{EXPORT_VERSION}",
    shell:
        PYTHON
        + " -m layersense export {input.verification:q} --manifest {input.manifest:q}"
        " --model {input.model:q} --database {input.database:q} --out {output:q}"
        " --threads {threads} --gpus {resources.gpu:q}" + CACHE + " > {log:q} 2>&1"
