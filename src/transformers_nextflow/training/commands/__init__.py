"""The trainings as commands, `transformers-nextflow train ...`: options in groups, as of the libraries' scripts.

- `options.py`: which model is trained, in which dtype, whole or by LoRA; the same for all.
- `transformer.py`, `tokenizer.py`, `grpo.py`: each a `main` of the remaining words. The diffusion decoder's is in
  `diffusers_nextflow`.
"""
