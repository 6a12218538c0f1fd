"""A Gradio Space that explains a sentence token by token with a lens from the Hub.

The lens is the one that the variable LENS names (a Hub id, or a folder to try it at home), at LENS_REVISION. Copy this
folder into a Space, set the variable in its settings, and it runs: `pip install -r requirements.txt; python app.py`.
"""

import os
from typing import Any

from transformers import AutoModel

import consistency_lens  # noqa: F401 - registers the models with transformers

MAX_CHARACTERS = 1000
EXAMPLE = "Once upon a time there was a little dog"
COLUMNS = ["token", "the lens's words", "FVE", "KL, nats", "next, original", "next, from the words"]
HOW_TO_READ = """Each token's activation is put into a few words by a decoder that sees nothing but the activation, and
an encoder that sees nothing but the words turns them back. **FVE**: how much of the activation comes back (1 all, 0 no
more than the mean). **KL**: by how much the model's prediction changes. Fluent words with a low FVE or a high KL are a
guess."""


def load_lens() -> Any:
    """The lens that LENS names."""
    name = os.environ.get("LENS")
    if not name:
        raise ValueError("LENS: not set; set it to the Hub id of a lens, in the Space's settings")
    return AutoModel.from_pretrained(name, revision=os.environ.get("LENS_REVISION"))


def read(lens: Any, text: str) -> tuple[list[tuple[str, float]], list[list[str]]]:
    """What the lens says of a text.

    Returns:
        Each token with its FVE, from 0 to 1, to be coloured by; and a row of `COLUMNS` for each.

    Raises:
        ValueError: if the text is empty or too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text has {len(text)} characters; up to {MAX_CHARACTERS} are read")
    explanation = lens.explain(text)
    coloured = [(token.token, min(max(token.fve, 0.0), 1.0)) for token in explanation]
    rows = [
        [
            token.token,
            token.text.strip(),
            f"{token.fve:.2f}",
            f"{token.kl:.2f}",
            likeliest(token.top_before),
            likeliest(token.top_after),
        ]
        for token in explanation
    ]
    return coloured, rows


def likeliest(top: list[tuple[str, float]]) -> str:
    """`dog 41% · cat 12%`."""
    return " · ".join(f"{token.strip() or repr(token)} {probability:.0%}" for token, probability in top)


def build(lens: Any) -> Any:
    """The page."""
    import gradio

    def answer(text: str) -> tuple[list[tuple[str, float]], list[list[str]]]:
        try:
            return read(lens, text)
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="A consistency lens") as page:
        gradio.Markdown("# What each token's activation says, in words\n\n" + HOW_TO_READ)
        text = gradio.Textbox(EXAMPLE, label="A sentence", lines=2, max_length=MAX_CHARACTERS)
        button = gradio.Button("Explain", variant="primary")
        tokens = gradio.HighlightedText(label="FVE of each token: the darker, the more the words carry")
        table = gradio.Dataframe(headers=COLUMNS, datatype="str", label="Token by token", wrap=True)
        gradio.on([button.click, text.submit], answer, text, [tokens, table])
    return page


if __name__ == "__main__":
    build(load_lens()).queue(max_size=20).launch()
