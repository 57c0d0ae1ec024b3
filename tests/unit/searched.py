"""The model that ModelOpt's own search leaves behind, made to choose a given recipe."""

import modelopt.torch.quantization as mtq
import pytest
from modelopt.torch.quantization import algorithms

from layersense.quantization.formats import known_formats
from layersense.quantization.modelopt_formats import modelopt_config


def search(model, data, recipe):
    """Run `auto_quantize` on ``model`` in place; all but its solver is ModelOpt's.

    ``data`` is a `Calibration`, ``recipe`` handle → format.
    """
    configs = {
        name: modelopt_config(known_formats()[name])
        for name in sorted(set(recipe.values()) - {"NONE"})
    }
    wanted = {
        name: algorithms.QuantRecipe(config, name=name) for name, config in configs.items()
    } | {"NONE": algorithms.QuantRecipe(quant_cfg=None)}

    def choose(self, *args, **kwargs):
        best = {}
        for handle, stats in self.candidate_stats.items():
            index = stats["formats"].index(wanted[recipe[handle]])
            best[handle] = {
                "format": stats["formats"][index],
                "costs": stats["costs"][index],
                "scores": stats["scores"][index],
            }
        return best, True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms.AutoQuantizeGradientSearcher, "run_search_with_stats", choose)
        mtq.auto_quantize(
            model,
            constraints={"effective_bits": 16.0},
            quantization_formats=list(configs.values()),
            data_loader=list(range(len(data.batches))),
            forward_step=lambda model, i: data.task.forward(model, data.batches[i]),
            loss_func=lambda output, i: data.task.loss(output, data.batches[i]),
            num_calib_steps=len(data.batches),
            num_score_steps=1,
            verbose=False,
        )
