#!/bin/sh
# Talk to a running server with curl alone:  sh examples/serve_curl.sh [URL] [PHOTO]
set -eu
URL=${1:-http://127.0.0.1:8000}
PHOTO=${2:-photo.jpg}
AUTH="Authorization: Bearer ${CLIPSTACK_TOKEN:-none}"

echo "models";     curl -sSf -H "$AUTH" "$URL/v1/models"; echo
echo "classify";   curl -sSf -H "$AUTH" "$URL/v1/classify" -F "inputs=@$PHOTO" -F labels=cat -F labels=dog -F top_k=2; echo
echo "label set";  curl -sSf -H "$AUTH" -X PUT "$URL/v1/label-sets/pets" -H 'Content-Type: application/json' \
                     -d '{"labels": ["cat", "dog", "hamster"], "templates": ["a photo of a {}, a pet."]}'; echo
echo "use it";     curl -sSf -H "$AUTH" "$URL/v1/classify" -F "inputs=@$PHOTO" -F label_set=pets; echo
echo "forget it";  curl -sSf -H "$AUTH" -X DELETE "$URL/v1/label-sets/pets"; echo
