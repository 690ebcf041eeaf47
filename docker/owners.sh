# Check, in the bench image and as root, that the owner of /results writes the report, and that root never does.
set -eu
for owner in 0 1000 54321; do
  chown "$owner:$owner" /results
  chmod 755 /results
  entrypoint.sh sh -c 'echo report >/results/report'
  writer=$(stat -c %u /results/report)
  echo "/results of user $owner: written by user $writer"
  [ "$writer" = "$owner" ] || { [ "$owner" = 0 ] && [ "$writer" = 1000 ]; }
  rm /results/report
done
