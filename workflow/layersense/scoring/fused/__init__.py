"""Engine ``fused``: every format from one ordinary backward pass, with ModelOpt's quantizers.

A score needs what any backward pass shows: a module's input X and the gradient at its output,
``g = ∂L/∂Y``. From these, ``ΔY = module(X) with its quantizers on − Y`` for any number of formats,
and the score is ``Σ (g · ΔY)²``, the formula of ModelOpt's ``AutoQuantizeGradientSearcher``.

- :mod:`.quantizers` inserts and calibrates ModelOpt's quantizers, taking statistics once.
- :mod:`.taps` records X and Y through autograd, and scores in the backward pass.
- :mod:`.kernels` computes Σ (g · ΔY)² without intermediate tensors.
- :mod:`.attention` makes one call of the attention windows that transformers runs one by one.
- :mod:`.graphs` replays the scoring of linear layers from CUDA graphs.
- :mod:`.check` holds the first step of each format against stock.
- :mod:`.held` tells from shapes what a pass will hold, and :mod:`.fit` what to reduce when memory
  runs out; :mod:`.coupling` says where a batch may not be split.
- :mod:`.batches` has the batches of any size.
- :mod:`.engine` puts them together.
"""

from layersense.scoring.fused.engine import measure

__all__ = ["measure"]
