#!/usr/bin/env python3
"""Unpacks vm-images/golden/good/*.gz into OUTDIR, keeping folders (chains need them) and holes.

usage: unpack.py OUTDIR [PREFIX]      PREFIX: only files whose name starts with it
Checks the sha256 of every file against manifest.json.
"""
import gzip, hashlib, json, os, sys

here = os.path.dirname(os.path.abspath(__file__))
out = sys.argv[1]
prefix = sys.argv[2] if len(sys.argv) > 2 else ''
zero = bytes(4096)
for e in json.load(open(os.path.join(here, 'manifest.json')))['images']:
    if not e['file'].startswith(prefix):
        continue
    data = gzip.open(os.path.join(here, e['gz'])).read()
    assert hashlib.sha256(data).hexdigest() == e['file_sha256'], e['file']
    path = os.path.join(out, e['file'])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
        for i in range(0, len(data), 4096):
            if data[i:i + 4096] != zero[:len(data) - i]:
                f.seek(i)
                f.write(data[i:i + 4096])
        f.truncate(len(data))
