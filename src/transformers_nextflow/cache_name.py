"""What transformers calls the cache of keys and values: `past_key_values`, from 5.24 on `cache`.

Here it is `past_key_values`; what is called or returned by name goes by [`CACHE`].
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature

from transformers.masking_utils import create_causal_mask

CACHE = next(name for name in ("cache", "past_key_values") if name in signature(create_causal_mask).parameters)
"""The keyword of models and the field of their outputs, in the installed transformers."""


def takes_cache(function: Callable) -> Callable:
    """Lets a function with a parameter `past_key_values` take it as [`CACHE`] too, and be seen to do so: transformers
    reads signatures."""
    if CACHE == "past_key_values":
        return function
    given = signature(function)
    names = [CACHE if name == "past_key_values" else name for name in given.parameters]

    @wraps(function)
    def renamed(*args, **kwargs):
        if CACHE in kwargs:
            if "past_key_values" in kwargs:
                raise ValueError(f"{CACHE} and past_key_values are the same: give one of them")
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return function(*args, **kwargs)

    parameters = [each.replace(name=name) for name, each in zip(names, given.parameters.values())]
    renamed.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed
