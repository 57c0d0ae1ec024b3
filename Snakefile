"""The table of contents: read the config, include the stages, name the targets."""

from snakemake.utils import min_version

min_version("9.0")

# A config given on the command line stands for itself: merged into the default one it would
# bring the demo's runs along.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"


report: "workflow/templates/captions/workflow.rst"


# Under `frozen: true` nothing is measured: the rules that could are not even there.
if not CONFIG.frozen:

    include: "workflow/rules/calibration.smk"
    include: "workflow/rules/models.smk"
    include: "workflow/rules/extensions.smk"
    include: "workflow/rules/scoring.smk"
    include: "workflow/rules/verification.smk"
    include: "workflow/rules/export.smk"


include: "workflow/rules/recipes.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/reports.smk"


rule all:
    """Everything: tables, recipes, verification, reports and the summary of all runs."""
    default_target: True
    input:
        targets("reports"),
        targets("tables"),
        targets("recipes"),
        targets("verification"),


rule verification_tables:
    """What was measured on held-out rows against what was predicted, and whatever it needs."""
    input:
        targets("verification"),


rule recipes:
    """The recipes as ModelOpt configs, and whatever they need."""
    input:
        targets("recipes"),


rule reports:
    """The reports and the summary, and whatever they need."""
    input:
        targets("reports"),


rule tables:
    """The tables, and whatever they need."""
    input:
        targets("tables"),


if not CONFIG.frozen:

    rule scores:
        """The measurements alone."""
        input:
            targets("scores"),

    rule export:
        """The checkpoints that runs list under `export`, and whatever they need."""
        input:
            checkpoints_to_ship,


onerror:
    # What whoever is on call reads last, and first: causes, not jobs.
    tell_failures(log)
