"""Llama for Paddock: every `LlamaForCausalLM`, from Llama 2 to 3.x and the models that share its shape."""
