#!/usr/bin/env bash
# Builds the documentation as a site, build/site/index.html. A broken link or a page outside the menu is an error.
# Needs the extra [docs].
set -euo pipefail
cd "$(dirname "$0")/.."
pages=build/site-pages
rm -rf "$pages" && mkdir -p "$pages"
# Pages link to each other as they do in the repository; so they stand as they do there.
cp -r --parents README.md CONTRIBUTING.md .pre-commit-config.yaml docs examples \
    testbed/engine/models/tiny-kv/README.md testbed/encoding/calibration/README.md "$pages"
# What tests read after a fence's language, the site's Markdown would take for text.
find "$pages" -name '*.md' -exec sed -E -i 's/^( *```[a-z]+) .*/\1/' {} +
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
echo "build/site/index.html"
