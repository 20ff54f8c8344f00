#!/usr/bin/env bash
# Writes docker/.env, readable by its owner alone: .env.example with a random secret in place of every placeholder.
set -euo pipefail
umask 077
cd "$(dirname "$0")"
if [[ -e .env ]]; then
  echo "docker/.env is there already; remove it first if every secret in it may be lost" >&2
  exit 2
fi
while IFS= read -r line; do
  [[ "$line" != *=change-me ]] || line="${line%change-me}$(openssl rand -hex 24)"
  printf '%s\n' "$line"
done <.env.example >.env.new
mv .env.new .env
echo "docker/.env has new secrets"
