"""Damage files and read them: checkpoints, tables, images, archives, downloads.

    python tests/attacks/damage.py --checkpoints 8000 --files 5000 --downloads 30

Bits are flipped, pieces cut out, zeroed, doubled or swapped, at random places. A damaged checkpoint
is refused by ``CheckpointError``, or gives what was written, bit for bit. A damaged data file is
refused by an error that names it, or taken where the damage does not matter to the format. A bad
download is refused and nothing of it is kept. Anything else is wrong: exit status 1.
"""

import argparse
import collections
import http.server
import io
import os
import random
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ppvae
from ppvae import CheckpointError, Checkpoints, conditionals, data, guides, models, nets
from ppvae.data import fetch
from ppvae.train.checkpoint import digest, read


def damaged(rng, content):
    """The content with one random damage."""
    raw = bytearray(content)
    kind = rng.choice(["bit", "bits", "cut", "zero", "double", "swap", "insert", "end"])
    at = rng.randrange(len(raw))
    size = rng.randrange(1, 1 + min(200, len(raw) - at))
    if kind == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(rng.randrange(2, 20)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at : at + size]
    elif kind == "zero":
        raw[at : at + size] = bytes(size)
    elif kind == "double":
        raw[at:at] = raw[at : at + size]
    elif kind == "swap":
        other = rng.randrange(len(raw) - size + 1)
        raw[at : at + size], raw[other : other + size] = (
            raw[other : other + size],
            raw[at : at + size],
        )
    elif kind == "insert":
        raw[at:at] = rng.randbytes(size)
    else:
        del raw[at:]
    return bytes(raw)


def checkpoints(number, rng, where):
    """Counts for damaged checkpoints."""
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    svi = ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)))
    x = torch.bernoulli(torch.full((50, 4), 0.5))
    ppvae.fit(svi, x, epochs=2, valid=x, checkpoint=where / "run", progress=False)
    whole = Checkpoints(where / "run").paths()[-1]
    content, expected = whole.read_bytes(), digest(read(whole))
    count, path = collections.Counter(), where / "step-00000001.pt"
    for _ in range(number):
        path.write_bytes(damaged(rng, content))
        try:
            found = digest(read(path))
        except CheckpointError as error:
            count["refused" if path.name in str(error) else "wrong"] += 1
        except Exception as error:
            count["wrong"] += 1
            print(f"checkpoint: {type(error).__name__}: {error}", flush=True)
        else:
            count["equal" if found == expected else "wrong"] += 1
    return count


def tables():
    """Whole files, by name."""
    rows = np.random.default_rng(0).random((40, 5))
    plain, packed, picture = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(plain, x=rows, y=np.arange(40) % 2)
    np.savez_compressed(packed, x=rows, y=np.arange(40) % 2)
    Image.fromarray((rows * 255).astype(np.uint8)).save(picture, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray((rows * 255).astype(np.uint8)).save(jpeg, "JPEG")
    csv = "a,b\n" + "\n".join(f"{a},{b}" for a, b in rows[:, :2])
    return {
        "plain.npz": plain.getvalue(),
        "packed.npz": packed.getvalue(),
        "table.csv": csv.encode(),
        "one.png": picture.getvalue(),
        "one.jpg": jpeg.getvalue(),
    }


def files(number, rng, where):
    """Counts for damaged data files."""
    count, whole = collections.Counter(), tables()
    folder = where / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(folder / f"whole{i}.png")
    for i in range(number):
        name = list(whole)[i % len(whole)]
        is_picture = not name.endswith(("npz", "csv"))
        path = (folder if is_picture else where) / name
        path.write_bytes(damaged(rng, whole[name]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data.load(folder if is_picture else path)
        except (ValueError, TypeError) as error:
            named = name in str(error) or (is_picture and folder.name in str(error))
            count["refused" if named else "wrong"] += 1
            if not named:
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        except Exception as error:
            count["wrong"] += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        else:
            count["taken"] += 1
        path.unlink()
    return count


def downloads(number, rng, where):
    """Counts for bad answers of a server."""
    body, answer = b"0 1 2\n" * 3000, {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    os.environ |= {"NO_PROXY": "127.0.0.1", "PPVAE_DATA": str(where / "cache")}
    fetch.URLS["20news"] = here
    kinds = [
        lambda: (302, {"Location": f"file://{__file__}"}, b""),
        lambda: (302, {"Location": "ftp://127.0.0.1/"}, b""),
        lambda: (302, {"Location": here}, b""),
        lambda: (rng.choice([403, 404, 500, 503]), {}, body),
        lambda: (200, {"Content-Length": str(len(body) + rng.randrange(1, 999))}, body),
        lambda: (200, {}, damaged(rng, body)),
        lambda: (200, {}, b""),
        lambda: (200, {"Content-Encoding": "gzip"}, rng.randbytes(99)),
    ]
    count = collections.Counter()
    for i in range(number):
        answer["status"], answer["headers"], answer["body"] = kinds[i % len(kinds)]()
        try:
            fetch.fetch("20news", "train.feat")
        except (ConnectionError, ValueError) as error:
            kept = (where / "cache").exists()
            count["wrong" if kept or "train.feat" not in str(error) else "refused"] += 1
        except Exception as error:
            count["wrong"] += 1
            print(f"download: {type(error).__name__}: {error}", flush=True)
        else:
            count["wrong"] += 1
    server.shutdown()
    server.server_close()
    return count


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--downloads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wrong = 0
    for attack in (checkpoints, files, downloads):
        number, rng = getattr(asked, attack.__name__), random.Random(asked.seed)
        with tempfile.TemporaryDirectory() as where:
            count = attack(number, rng, Path(where))
        wrong += count["wrong"]
        print(f"{number:,} damaged {attack.__name__}: {dict(count)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
