#!/usr/bin/env bash
# A role and a database for Optuna, a role and two databases for MLflow: each has migrations in a table of the same name, so they
# cannot share one. PostgreSQL's image runs this once, on a new volume; run again, it sets the passwords anew.
set -euo pipefail
: "${OPTUNA_PASSWORD:?} ${MLFLOW_DATABASE_PASSWORD:?}"

# \getenv keeps the passwords off command lines, where every process could read them.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\getenv own_password POSTGRES_PASSWORD
\getenv optuna_password OPTUNA_PASSWORD
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
\if :{?own_password}
alter role current_user password :'own_password';
\endif
select format('create role %I login', name) from (values ('slimfront'), ('mlflow')) as wanted (name)
  where name not in (select rolname from pg_roles) \gexec
alter role slimfront password :'optuna_password';
alter role mlflow password :'mlflow_password';
select format('create database %I owner %I', name, owner)
  from (values ('optuna', 'slimfront'), ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow')) as wanted (name, owner)
  where name not in (select datname from pg_database) \gexec
revoke all on database optuna, mlflow, mlflow_auth, postgres from public;
SQL
