"""Load a checkpoint in the real vLLM, which has the last word on what it reads."""

from pathlib import Path

from layersense.errors import LayersenseError

PROMPT = "The"
TOKENS = 8


def load_and_generate(folder: Path) -> list[str]:
    """Return why vLLM cannot load a checkpoint and write a few tokens; empty if it can.

    Raises:
        LayersenseError: vLLM is not installed here.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise LayersenseError(
            f"vLLM cannot be imported ({error}); install it into an environment of its own and run "
            "`layersense check` from there, with PYTHONPATH on workflow/"
        ) from error
    try:
        model = LLM(model=str(folder), max_model_len=512, enforce_eager=True)
        answers = model.generate([PROMPT], SamplingParams(max_tokens=TOKENS, temperature=0.0))
    except Exception as error:  # whatever vLLM raises is its answer
        return [f"vLLM: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    written = answers[0].outputs[0].token_ids
    return [] if len(written) > 0 else ["vLLM: loads it and writes nothing"]
