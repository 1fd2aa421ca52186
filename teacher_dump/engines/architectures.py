"""Which architectures can be teachers, by the end of their names; text alone, if multimodal."""

CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def names_no_head(architecture: str) -> bool:
    """Whether it is layers alone by its name, such as `LlamaModel`, to which vLLM adds a head."""
    return architecture.endswith("Model") and not architecture.endswith(
        ("LMHeadModel", "ChatModel")
    )
