"""Which architectures can be teachers, by the end of their names; text alone, if multimodal."""

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
