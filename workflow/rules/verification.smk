"""Verification: one job a run, on a GPU unless the run says otherwise."""


rule verify:
    """Measure single groups and whole recipes on the held-out rows, where that is missing."""
    input:
        model=lambda wildcards: paths.model(CONFIG.runs[wildcards.run].model),
        database=lambda wildcards: paths.calibration(CONFIG.runs[wildcards.run].dataset),
        manifests=manifests_of_run,
    output:
        update(paths.verification("{run}")),
    log:
        paths.log("verify", "{run}"),
    benchmark:
        paths.benchmark("verify", "{run}")
    priority: longest_first
    conda:
        lambda wildcards: environment("cuda" if on_gpu(wildcards) else "cpu")
    # On a CPU the steps are many and small, and threads would mostly wait for each other.
    threads: lambda wildcards: 4 if on_gpu(wildcards) else 1
    resources:
        gpu=gpus_of_run,
        mem_mb=lambda wildcards, input, attempt: job_resources.memory_mb(
            job_resources.model_size_mb(input.model),
            CONFIG.runs[wildcards.run].device,
            attempt,
        ),
        runtime=lambda wildcards, input, attempt: job_resources.minutes(
            job_resources.model_size_mb(input.model), attempt
        ),
    params:
        settings=slice_of(settings.verify_settings, "run"),
    shell:
        PYTHON + " -m layersense verify {wildcards.run:q} {input.manifests:q}"
        " --settings {params.settings:q} --model {input.model:q} --database {input.database:q}"
        " --out {output:q} --threads {threads} --gpus {resources.gpu:q}"
        + CACHE
        + " > {log:q} 2>&1"
