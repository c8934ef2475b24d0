"""The pocket model: a Llama small enough to be trained from scratch on a laptop, with a tokenizer of whole words."""

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# Every word of the three tasks' questions and derivations; words that are not here are spelled letter by letter.
WORDS = (
    "Consider these statements Does it logically follow that Answer Yes or No All Some are not So and Claim It follows "
    "does nothing How many times the letter appear in text Given What can we conclude with one formula that is new "
    "From can be false uses only a premise any conjunction of premises nor equivalent to them"
).split()
# The system message is left out: its words are an instruction, and a model that learns nothing but these tasks from
# nothing has no use for it, while every rollout would pay for its tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}" + USER + "{{ message.content }}"
    "{% elif message.role == 'assistant' %}" + ASSISTANT + "{{ message.content }}" + END + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for the three tasks. A word before a closing quotation mark is spelled in letters.

    Its vocabulary has about 180 entries. Text comes back with a blank between tokens, none before , . ? !
    """
    from reasoning_gym.logic.syllogisms import SyllogismDataset

    terms = [term.plural for term in SyllogismDataset.DEFAULT_TERMS]
    words = sorted(set(WORDS + terms))
    special = [PAD, END, USER, ASSISTANT, UNKNOWN]
    signs = list("()¬∧∨→↔=.,:?!'\"-")
    vocabulary = special + TAGS + words + list(string.ascii_letters + string.digits) + signs
    # One pattern finds the tokens: tags, then known words that no quotation mark follows, then single characters.
    known = "|".join(sorted(words, key=len, reverse=True))
    pattern = rf"{'|'.join(TAGS)}|\b(?:{known})\b(?!\")|\S"
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
    )


def pocket_model(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained Llama of about 0.6 M parameters and its tokenizer. `seed` sets the first weights."""
    tokenizer = pocket_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=100.0,  # positions told apart finely: texts are about 100 tokens long, and copying depends on it
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
