#!/bin/sh
# Registers a machine of the customer's own with the private cluster (Amazon ECS developer guide, "Registering an external
# instance to an Amazon ECS cluster").
#
#   anywhere.sh activate STACK REGION NUMBER            where you have credentials: makes an activation for NUMBER machines,
#                                                       good for a day, and prints the command for each machine
#   anywhere.sh join REGION CLUSTER ID CODE DIGEST      on the machine, as root: installs Docker, the SSM agent and the ECS
#                                                       agent, if the installer has the SHA-256 DIGEST that you checked
set -eu

usage() {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}

output() { # of a stack, by the output's name
    aws cloudformation describe-stacks --stack-name "$1" --region "$2" \
        --query "Stacks[0].Outputs[?OutputKey=='$3'].OutputValue" --output text
}

activate() {
    [ $# -eq 3 ] || usage
    cluster=$(output "$1" "$2" ClusterName)
    role=$(output "$1" "$2" MachineRoleName)
    if [ -z "$cluster" ] || [ -z "$role" ] || [ "$cluster" = None ] || [ "$role" = None ]; then
        echo "error: $1 has no cluster for machines of your own; set anywhere = true in fleet.toml and deploy it" >&2
        exit 1
    fi
    activation=$(aws ssm create-activation --region "$2" --iam-role "$role" --registration-limit "$3" \
        --expiration-date "$(date -u -d '+1 day' +%Y-%m-%dT%H:%M:%SZ)" \
        --query '[ActivationId, ActivationCode]' --output text)
    # shellcheck disable=SC2086  # two words
    set -- "$2" "$cluster" $activation
    echo "sh anywhere.sh join $1 $2 $3 $4 DIGEST"
}

join() {
    [ $# -eq 5 ] || usage
    [ "$(id -u)" -eq 0 ] || { echo "error: join needs root" >&2; exit 1; }
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    curl --proto '=https' --tlsv1.2 --fail --silent --show-error --output "$folder/install.sh" \
        "https://amazon-ecs-agent.s3.amazonaws.com/ecs-anywhere-install-latest.sh"
    echo "$5  $folder/install.sh" | sha256sum --check --quiet - || {
        echo "error: the installer is not the one with that digest; check its signature and give its digest" >&2
        exit 1
    }
    bash "$folder/install.sh" --region "$1" --cluster "$2" --activation-id "$3" --activation-code "$4"
}

[ $# -ge 1 ] || usage
verb=$1
shift
case $verb in
    activate) activate "$@" ;;
    join) join "$@" ;;
    *) usage ;;
esac
