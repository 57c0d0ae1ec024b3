"""Checkpoints: fetched, or built, before any GPU job starts."""


rule model:
    """Resolve a checkpoint: hub id to commit, directory to digest; or build the demo model."""
    input:
        checkpoint_files,
    output:
        paths.model("{model}"),
    log:
        paths.log("model", "{model}"),
    benchmark:
        paths.benchmark("model", "{model}")
    # Compute nodes often have no network.
    localrule: True
    conda:
        environment("cpu")
    threads: 4
    params:
        settings=slice_of(settings.model_settings, "model"),
    shell:
        PYTHON
        + " -m layersense model {wildcards.model:q} --settings {params.settings:q}"
        " --out {output:q} > {log:q} 2>&1"
