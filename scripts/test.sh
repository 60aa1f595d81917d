#!/usr/bin/env bash
# Runs the tests, in an environment that it makes itself: 6 to 16 minutes on two CPU cores.
#
#   bash scripts/test.sh                            # all but those marked slow, network or ci
#   bash scripts/test.sh -k formats -x              # arguments go to pytest
#   PROCESSES=1 bash scripts/test.sh -m slow        # the marked ones, one at a time
#   PROCESSES=1 bash scripts/test.sh -m gpu         # those that need a GPU; all others leave one alone
#
# With pytest-xdist two processes (PROCESSES) share the tests; without it, one runs them all and takes twice as long. It
# comes with tests/requirements.txt, as do the trackers, notebooks and chat page, whose tests are skipped otherwise:
#   .venv/bin/python -m pip install -r tests/requirements.txt && bash .ci/browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
export OMP_NUM_THREADS=1  # a process for each core
share=()
if [ "${PROCESSES:-2}" -gt 1 ] && .venv/bin/python -c 'import xdist' 2>/dev/null; then
    share=(-n "${PROCESSES:-2}")
fi
exec .venv/bin/python -m pytest -q "${share[@]+"${share[@]}"}" "$@"  # without a path: `testpaths` of pyproject.toml, tests/
