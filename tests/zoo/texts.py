"""Tiny language models without images, of the real classes with random weights."""

import transformers as hf
from zoo.vlm_parts import IDS, WIDTH, Made, bart, chat, decoder, model_of, t5, words


def gpt2_text() -> Made:
    """GPT-2."""
    tokens = words()
    sizes = {"n_positions": 128, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 48}
    return model_of("gpt2", hf.AutoModelForCausalLM, vocab_size=len(tokens), **sizes, **IDS), tokens


def llama_text() -> Made:
    """Llama, which chats."""
    tokens = words("<s> $A", ["<|turn|>"])
    tokens.chat_template = chat("<|turn|>ROLE\n", "", "</s>\n", start="{{ bos_token }}")
    return model_of("llama", hf.AutoModelForCausalLM, **decoder("llama", tokens)), tokens


def t5_text() -> Made:
    """T5."""
    tokens = words("$A </s>")
    return model_of("t5", hf.AutoModelForSeq2SeqLM, **t5(tokens)), tokens


def bart_text() -> Made:
    """BART."""
    tokens = words("<s> $A </s>")
    return model_of("bart", hf.AutoModelForSeq2SeqLM, **bart(tokens)), tokens
