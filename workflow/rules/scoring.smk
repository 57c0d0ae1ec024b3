"""Scores: one job a run, on a GPU unless the run says otherwise."""


rule score:
    """Measure every layer group under the formats that are missing; keep what is measured."""
    input:
        model=lambda wildcards: paths.model(CONFIG.runs[wildcards.run].model),
        database=lambda wildcards: paths.calibration(CONFIG.runs[wildcards.run].dataset),
        extensions=extensions_of_run,
    output:
        scores=update(paths.scores("{run}")),
        measured=update(paths.measured("{run}")),
    log:
        paths.log("score", "{run}"),
    benchmark:
        paths.benchmark("score", "{run}")
    priority: longest_first
    conda:
        lambda wildcards: environment("cuda" if on_gpu(wildcards) else "cpu")
    threads: 4
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
        settings=slice_of(settings.score_settings, "run"),
        formats=formats_to_have,
    shell:
        PYTHON
        + " -m layersense score {wildcards.run:q} {input.extensions:q} --settings {params.settings:q}"
        " --formats {params.formats:q} --model {input.model:q} --database {input.database:q}"
        " --out {output.scores:q} --measured {output.measured:q} --threads {threads} --gpus {resources.gpu:q}"
        + CACHE
        + " > {log:q} 2>&1"
