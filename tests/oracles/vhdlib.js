// Reads a VHD chain with vhd-lib 0.7.2 and writes its disk as one dynamic VHD.
// usage: NODE_PATH=target/oracles/node_modules node vhdlib.js OUT LEAF PARENT GRANDPARENT ...
'use strict'
const fs = require('fs')
const { createSyntheticStream } = require('vhd-lib')

const descriptor = f => (typeof f === 'string' ? fs.openSync(f, 'r') : f.fd)

const handler = {
  async openFile (path, flags) { return { fd: fs.openSync(path, flags), path } },
  async closeFile (f) { fs.closeSync(f.fd) },
  async read (f, buffer, position) {
    const fd = descriptor(f)
    const bytesRead = fs.readSync(fd, buffer, 0, buffer.length, position)
    if (typeof f === 'string') fs.closeSync(fd)
    return { bytesRead, buffer }
  },
  async getSize (f) { return fs.statSync(typeof f === 'string' ? f : f.path).size },
}

const [out, ...chain] = process.argv.slice(2)
createSyntheticStream(handler, chain)
  .then(stream => new Promise((resolve, reject) =>
    stream.on('error', reject).pipe(fs.createWriteStream(out)).on('error', reject).on('finish', resolve)))
  .catch(error => { console.error(error.message); process.exit(1) })
