"""Recipes: which format each layer group takes under a scheme's budget."""


rule solve:
    """Solve one scheme over the scores: the manifest, with findings and the choice."""
    input:
        scores=measured_scores,
    output:
        paths.manifest("{run}", "{scheme}"),
    log:
        paths.log("solve", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("solve", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        settings=slice_of(settings.scheme_settings, "run", "scheme"),
        version=f"manifest-{MANIFEST_VERSION}",
    shell:
        PYTHON + " -m layersense solve {wildcards.run:q} {wildcards.scheme:q}"
        " --settings {params.settings:q} --scores {input.scores:q} --out {output:q}"
        " > {log:q} 2>&1"
