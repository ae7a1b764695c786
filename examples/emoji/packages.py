"""Where the emoji world comes from: six npm packages at pinned versions, fetched by npm and checked by hash."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One npm package.

    Attributes:
        name, version: as the registry knows them.
        sha512: of the archive, base64 as npm writes it.
        licence: SPDX identifier of the pictures or texts inside.
        attribution: who made them.
    """

    name: str
    version: str
    sha512: str
    licence: str
    attribution: str

    @property
    def archive(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


STYLES = {
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "Fluent Emoji (3D), Microsoft Corporation",
    ),
    "fluent flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji (flat), Microsoft Corporation",
    ),
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji, Google Inc",
    ),
    "noto classic": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji (version 1), Google Inc",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji, Twitter and other contributors",
    ),
}
WORDS = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "emojibase, Miles Johnson",
)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched by `npm pack` unless it is there.

    Raises:
        RuntimeError: npm is missing or fails.
        ValueError: the archive has another hash than the pinned one; it is not kept.
    """
    path = folder / package.archive
    if not path.exists():
        if shutil.which("npm") is None:
            raise RuntimeError(f"npm is needed to fetch {package.name}; install Node.js, which brings it")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", partial, "--silent"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"npm could not fetch {package.name}@{package.version}: {done.stderr.strip()}")
            (archive,) = Path(partial).iterdir()
            _check(archive, package)
            archive.replace(path)
    _check(path, package)
    return path


def _check(path: Path, package: Package) -> None:
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(f"{path} has the SHA-512 {found}, expected {package.sha512} for {package.name}")


def read_json(archive: Path, member: str):
    """A JSON file out of a package's archive."""
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


def read_icons(archive: Path) -> dict[str, str]:
    """Icon name -> a whole square SVG, of the icons that the package shows (neither aliases nor hidden ones)."""
    icons = read_json(archive, "icons.json")
    svgs = {}
    for name, icon in icons["icons"].items():
        if icon.get("hidden"):
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        edge = max(width, height)
        view = f"{left - (edge - width) / 2} {top - (edge - height) / 2} {edge} {edge}"
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        svgs[name] = f'{head}viewBox="{view}">{icon["body"]}</svg>'
    return svgs
