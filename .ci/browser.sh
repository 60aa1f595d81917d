#!/usr/bin/env bash
# Chromium from Debian's packages, for the tests of the pages: bash .ci/browser.sh
# Does nothing where it is there already. Needs root, or sudo without a password.
set -euo pipefail
command -v chromium >/dev/null && exit 0
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null
chromium --version
