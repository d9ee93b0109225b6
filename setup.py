"""What setup.cfg cannot say: on an index page the README's links lead to the repository."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "setup.cfg", encoding="utf-8")
url = config["metadata"]["url"]
readme = (here / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"\]\((?!https?://)([^)]+)\)", rf"]({url}/blob/main/\1)", readme)
readme = re.sub(r'src="(?!https?://)([^"]+)"', rf'src="{url}/raw/main/\1"', readme)

setup(long_description=readme, long_description_content_type="text/markdown")
