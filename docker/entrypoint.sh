#!/usr/bin/env bash
# What a container runs: a role (head, worker, mlflow, mlflow-password, postgres, submit, healthy) with further options, or any command.
# A secret NAME comes from the environment, or from the file that NAME_FILE names. Without one that a role needs, or with a
# placeholder for it, the role does not start: one sentence, exit code 2.
set -euo pipefail
export MLFLOW_DISABLE_TELEMETRY=true RAY_USAGE_STATS_ENABLED=0

refuse() {
  echo "slimfront: $*" >&2
  exit 2
}

# Reads NAME_FILE into NAME, if there is one, and refuses what nobody should use as a secret.
given() {
  local name file value
  for name in "$@"; do
    file="${name}_FILE"
    if [[ -n "${!file:-}" ]]; then
      [[ -r "${!file}" ]] || refuse "$file names ${!file}, which cannot be read; mount the secret there"
      export "$name=$(<"${!file}")"
      unset "$file"
    fi
    value="${!name:-}"
    case "$value" in
      "") unset "$name" ;; # what an empty variable means differs between programs
      change-me*) refuse "$name is still the placeholder; docker/secrets.sh makes secrets" ;;
      *) ((${#value} >= 16)) || refuse "$name is shorter than 16 characters; docker/secrets.sh makes secrets" ;;
    esac
  done
}

needed() {
  local name
  given "$@"
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || refuse "$name is not set; docker/secrets.sh makes secrets"
  done
}

# Every process of Ray asks for the token, and shows it.
token() {
  if [[ -n "${RAY_AUTH_TOKEN_PATH:-}" ]]; then
    export RAY_AUTH_TOKEN_FILE="$RAY_AUTH_TOKEN_PATH"
    unset RAY_AUTH_TOKEN_PATH
  fi
  needed RAY_AUTH_TOKEN
  export RAY_AUTH_MODE=token
}

database_of_users() {
  [[ -n "${MLFLOW_AUTH_DATABASE_URI:-}" ]] || refuse "MLFLOW_AUTH_DATABASE_URI is not set; it names the database of MLflow's users"
}

role="${1:-}"
case "$role" in
  head)
    token
    given PGPASSWORD MLFLOW_TRACKING_PASSWORD
    exec ray start --head --block "${@:2}"
    ;;
  worker)
    token
    exec ray start --block "${@:2}"
    ;;
  submit)
    token
    exec slimfront submit --address "${SLIMFRONT_ADDRESS:-http://head:8265}" "${@:2}"
    ;;
  mlflow)
    needed PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
    database_of_users
    MLFLOW_AUTH_CONFIG_PATH="$(mktemp)"
    export MLFLOW_AUTH_CONFIG_PATH
    # Without a secret: the password of the database is PGPASSWORD, that of the administrator MLFLOW_AUTH_ADMIN_PASSWORD.
    printf '%s\n' '[mlflow]' "default_permission = ${MLFLOW_AUTH_DEFAULT_PERMISSION:-READ}" \
      "database_uri = ${MLFLOW_AUTH_DATABASE_URI//%/%%}" \
      'authorization_function = mlflow.server.auth:authenticate_request_basic_auth' >"$MLFLOW_AUTH_CONFIG_PATH"
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # processes for jobs that a search has none of
    exec mlflow server --app-name basic-auth --serve-artifacts "${@:2}"
    ;;
  mlflow-password) # of the administrator: the server takes it from the environment only when it first makes that user
    needed PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD
    database_of_users
    exec python -c 'import os
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore()
store.init_db(os.environ["MLFLOW_AUTH_DATABASE_URI"])
store.update_user(os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], password=os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])'
    ;;
  postgres)
    needed POSTGRES_PASSWORD OPTUNA_PASSWORD MLFLOW_DATABASE_PASSWORD
    exec docker-entrypoint.sh "$@" # the image's own
    ;;
  healthy)
    exec python -I -c 'import sys, urllib.request
try:
    for url in sys.argv[1:]:
        urllib.request.urlopen(url, timeout=3).close()
except OSError as error:
    sys.exit(f"{url}: {error}")' "${@:2}"
    ;;
  "") refuse "say what to run: head, worker, mlflow, submit CONFIG, or a command such as slimfront check CONFIG" ;;
  *) exec "$@" ;;
esac
