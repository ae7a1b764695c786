"""Released weights in and out: TokenFlow's vision tokenizers, and text decoders of Llama, Qwen2 and Qwen2.5-VL."""
