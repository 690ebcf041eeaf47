# In the bench image, as root: does the owner of /results write the report, whoever that is, and root never?
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
