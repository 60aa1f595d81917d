#!/usr/bin/env bash
# Runs the tests, in an environment that it makes itself: about 22 minutes on two CPU cores.
#
#   bash scripts/test.sh                            # all but those marked slow or network
#   bash scripts/test.sh -k formats -x              # arguments go to pytest
#   bash scripts/test.sh -m "slow or gpu"           # the marked ones; gpu tests need a GPU
#
# Trackers, notebooks and the chat page are tested where tests/requirements.txt and Chromium are installed:
#   .venv/bin/python -m pip install -r tests/requirements.txt && bash .ci/browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec .venv/bin/python -m pytest -q "$@"  # without a path: `testpaths` of pyproject.toml, tests/
