"""Recipes: which format each layer group takes under a scheme's budget."""


rule solve:
    """Solve one scheme over the scores: the manifest, with findings and the choice."""
    input:
        scores=measured_scores,
        cost_table=cost_table,
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
        PYTHON
        + " -m layersense solve {wildcards.run:q} {wildcards.scheme:q} --settings {params.settings:q}"
        " --scores {input.scores:q} --out {output:q} > {log:q} 2>&1"


rule frontier:
    """The recipes of one scheme over all budgets, and the baselines to compare with."""
    input:
        manifest=paths.manifest("{run}", "{scheme}"),
    output:
        report(
            paths.frontier("{run}", "{scheme}"),
            caption="../templates/captions/frontier-table.rst",
            category=category,
            subcategory="{run}",
            labels=labels("table of recipes, Parquet"),
        ),
    log:
        paths.log("frontier", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("frontier", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        version=f"frontier-{FRONTIER_VERSION}",
    shell:
        PYTHON
        + " -m layersense frontier --manifest {input.manifest:q} --out {output:q}"
        " > {log:q} 2>&1"


rule recipe:
    """The recipe of one scheme as ModelOpt configs, and for `hf_ptq.py --recipe`."""
    input:
        manifest=paths.manifest("{run}", "{scheme}"),
    output:
        config=paths.quant_config("{run}", "{scheme}"),
        yaml=paths.recipe_yaml("{run}", "{scheme}"),
    log:
        paths.log("recipe", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("recipe", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        version=f"quant-config-{QUANT_CONFIG_VERSION}",
    shell:
        PYTHON
        + " -m layersense recipe --manifest {input.manifest:q} --out {output.config:q}"
        " --yaml {output.yaml:q} > {log:q} 2>&1"


rule refined_recipe:
    """The recipe that measuring whole recipes found, in the same files as the scheme's own."""
    input:
        manifest=paths.manifest("{run}", "{scheme}"),
        measured=measured_verification,
    output:
        manifest=paths.refined("{run}", "{scheme}", "manifest.json"),
        config=paths.refined("{run}", "{scheme}", "quant_config.json"),
        yaml=paths.refined("{run}", "{scheme}", "recipe.yaml"),
    log:
        paths.log("refined", "{run}", "{scheme}"),
    benchmark:
        paths.benchmark("refined", "{run}", "{scheme}")
    conda:
        environment("report")
    params:
        settings=slice_of(settings.verify_options, "run"),
        version=f"refined-{VERIFICATION_TABLE_VERSION}-{QUANT_CONFIG_VERSION}",
    shell:
        PYTHON
        + " -m layersense refined --manifest {input.manifest:q} --measured {input.measured:q}"
        " --settings {params.settings:q} --out {output.manifest:q} > {log:q} 2>&1 && "
        + PYTHON
        + " -m layersense recipe --manifest {output.manifest:q} --out {output.config:q}"
        " --yaml {output.yaml:q} >> {log:q} 2>&1"
