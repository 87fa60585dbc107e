// How fast the parser of guest writes is on its own: `npm run build && node dist/bench/nbd-parser.js`. One JSON object per figure.
import { NBD_CMD_WRITE, NBD_REQUEST_MAGIC, RequestParser, type RequestSink } from '../core/nbd/index.ts'

class CountingSink implements RequestSink {
  requests = 0
  payloadBytes = 0
  /** Payload is copied here if given, as capture does with what it keeps. */
  readonly slab: Buffer | undefined

  constructor(slab?: Buffer) {
    this.slab = slab
  }

  onRequest(_type: number, _flags: number, _cookieHigh: number, _cookieLow: number, offsetBytes: number): void {
    this.requests += offsetBytes >= 0 ? 1 : 0
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    if (this.slab) chunk.copy(this.slab, this.payloadBytes % (this.slab.length / 2), start, end)
    this.payloadBytes += end - start
  }

  onRequestEnd(): void {
    // Nothing is kept.
  }
}

const writesOf = (lengthBytes: number, count: number): Buffer => {
  const bytes = Buffer.alloc((28 + lengthBytes) * count)
  for (let i = 0; i < count; i++) {
    const at = i * (28 + lengthBytes)
    bytes.writeUInt32BE(NBD_REQUEST_MAGIC, at)
    bytes.writeUInt16BE(NBD_CMD_WRITE, at + 6)
    bytes.writeUInt32BE(i, at + 12)
    bytes.writeUInt32BE(i * lengthBytes, at + 20)
    bytes.writeUInt32BE(lengthBytes, at + 24)
  }
  return bytes
}

/** Runs for about a second. @returns requests per second */
const measure = (stream: Buffer, chunkBytes: number, slab?: Buffer): number => {
  const sink = new CountingSink(slab)
  const parser = new RequestParser(sink, { maxPayloadBytes: 32 * 1024 * 1024 })
  const once = (): void => {
    for (let at = 0; at < stream.length; at += chunkBytes) parser.push(stream, at, Math.min(at + chunkBytes, stream.length))
  }
  for (let warm = 0; warm < 200; warm++) once()
  const before = sink.requests
  const startMs = performance.now()
  while (performance.now() - startMs < 1000) for (let i = 0; i < 50; i++) once()
  return ((sink.requests - before) * 1000) / (performance.now() - startMs)
}

const report = (name: string, value: number, unit: string): void => console.log(JSON.stringify({ name, value: Number(value.toPrecision(4)), unit }))

const slab = Buffer.alloc(16 * 1024 * 1024)
report('nbd.parser.4k.16perChunk', measure(writesOf(4096, 16), 16 * 4124), 'requests/s')
report('nbd.parser.4k.1perChunk', measure(writesOf(4096, 16), 4124), 'requests/s')
report('nbd.parser.4k.64KiBchunks', measure(writesOf(4096, 160), 65_536), 'requests/s')
report('nbd.parser.4k.16perChunk.copied', measure(writesOf(4096, 16), 16 * 4124, slab), 'requests/s')
report('nbd.parser.1m.64KiBchunks.copied', measure(writesOf(1 << 20, 8), 65_536, slab) / 1024, 'GiB/s')
