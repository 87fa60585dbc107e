import { Duplex } from 'node:stream'
import { parseFrameHeader } from '../../core/record/index.ts'
import { MessageParser, MessageType, ackMessage, readHello, welcomeMessage } from '../../core/stream/index.ts'

/** An agent that keeps nothing and acknowledges at once, in the capture worker's own thread: what is left is capture alone. */
export const nullAgent = (): Duplex => {
  let epoch = 1
  const parser = new MessageParser((type, body) => {
    if (type === MessageType.hello) {
      const hello = readHello(body)
      epoch = Math.max(1, hello.epoch)
      const { generation } = hello
      stream.push(welcomeMessage({ epoch, generation, durableSeq: 0, baseComplete: true, syncProgress: {}, disks: [] }))
    }
  })
  const stream: Duplex = new Duplex({
    read: () => undefined,
    // The sender corks three buffers: message header, frame head, payload. Only the head is looked at.
    writev: (chunks, done) => {
      for (const { chunk } of chunks as { chunk: Buffer }[]) {
        if (chunk.length >= 64 && chunk.readUInt32LE(0) === 0x46504443) stream.push(ackMessage({ epoch, durableSeq: parseFrameHeader(chunk).lastSeq }))
      }
      done()
    },
    write: (chunk: Buffer, _encoding, done) => {
      parser.push(chunk)
      done()
    },
  })
  return stream
}
