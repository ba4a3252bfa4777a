"""Draws vista.svg, README's figure of the term: `python3 docs/figures/vista.py`.

One box per position of the decoder's input. An arc joins each text token's embedding x_t to S_n; it is as wide as the
token's weight t/m.
"""

from pathlib import Path

TEXT, IMAGE, INK = "#2f6db3", "#d9772b", "#333333"
POSITIONS = ["a", "chat", *["image"] * 4, "what", "color", "?", "it", "is", "red"]  # m = 8 text tokens
WIDTH, BOX, LEFT, INPUT, OUTPUT = 900, 62, 36, 300, 150  # pixels; INPUT and OUTPUT are the rows' y


def center(position: int) -> float:
    return LEFT + position * (BOX + 8) + BOX / 2


def box(position: int, y: int, color: str, label: str, word: str = "") -> str:
    x = center(position)
    text = f'<text x="{x}" y="{y + 19}" fill="white" font-style="italic">{label}</text>'
    below = f'<text x="{x}" y="{y + 46}" fill="{INK}" font-size="13">{word}</text>'
    return f'<rect x="{x - BOX / 2}" y="{y}" width="{BOX}" height="28" rx="5" fill="{color}"/>{text}{below}'


def sub(base: str, index: object) -> str:
    return f'{base}<tspan dy="4" font-size="11">{index}</tspan>'


def draw() -> str:
    images = [i for i, word in enumerate(POSITIONS) if word == "image"]
    words = [i for i, word in enumerate(POSITIONS) if word != "image"]
    m, target = len(words), center(images[-1])
    parts = []
    for t, position in enumerate(words, start=1):
        start, y = center(position), INPUT
        curve = f"M {start} {y} C {start} {y - 75}, {target} {OUTPUT + 105}, {target} {OUTPUT + 30}"
        stroke = f'stroke="{TEXT}" stroke-opacity="0.55" stroke-width="{7 * t / m}"'
        parts.append(f'<path d="{curve}" fill="none" {stroke}/>')
        parts.append(box(position, INPUT, TEXT, sub("x", t), POSITIONS[position]))
    for n, position in enumerate(images, start=1):
        parts.append(box(position, INPUT, IMAGE, "image", "patch"))
        last = n == len(images)
        shade = "" if last else ' opacity="0.35"'
        parts.append(f"<g{shade}>{box(position, OUTPUT, IMAGE, sub('S', 'n' if last else n))}</g>")
    notes = [
        (WIDTH / 2, 34, 17, "loss = cross-entropy + the mean over t of (t/m) · distance(x_t, S_n)"),
        (WIDTH / 2, 62, 14, "the width of an arc is t/m: the m-th text token counts m times as much as the first"),
        (target, OUTPUT - 14, 14, "the decoder's last hidden states at the image tokens"),
        (WIDTH / 2, INPUT + 76, 14, "the decoder's input: text from the embedding table, images from the projector"),
    ]
    parts += [f'<text x="{x}" y="{y}" font-size="{size}" fill="{INK}">{text}</text>' for x, y, size, text in notes]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 400" font-family="sans-serif" font-size="15" '
        f'text-anchor="middle">\n<rect width="{WIDTH}" height="400" fill="white"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
