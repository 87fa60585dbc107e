import { writeSync } from 'node:fs'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { frameAt, recordCountAt, STREAM_DISKS } from './journal-stream.ts'

// Child of journal-kill.test.ts: opens the store in argv[2] and appends until it is killed. Each acknowledged sequence is a line on
// stdout. argv[3]: how many frames it sends again that the store holds already.
const [, , directory, again] = process.argv
const sealer = new SegmentSealer()
const store = await VmStore.open({ directory, vm: 'kill', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer, limits: { segmentRecords: 50 } })
const attach = store.epoch > 0 && Number(again) % 2 === 0 ? await store.resumeEpoch(store.epoch) : await store.beginEpoch(STREAM_DISKS)
let wake: () => void = () => undefined
store.onDurable = (durableSeq) => {
  writeSync(1, `${durableSeq}\n`)
  wake()
}
store.onStopped = (error) => {
  writeSync(2, `stopped: ${error.message}\n`)
  process.exit(1)
}
const starts: number[] = []
let seq = 1
while (seq <= attach.durableSeq) {
  starts.push(seq)
  seq += recordCountAt(seq)
}
if (seq !== attach.durableSeq + 1) throw new Error(`durable up to ${attach.durableSeq}, which is inside a frame`)
for (const firstSeq of starts.slice(-Number(again) - 1)) {
  // Frames of the initial sync may not be sent again once it is over: they are no longer of this stream.
  if (!attach.baseComplete || firstSeq > store.baseSeq) store.accept(frameAt(firstSeq, attach.epoch))
}
for (;;) {
  for (let burst = 0; burst < 1 + (seq % 7); burst++) {
    store.accept(frameAt(seq, attach.epoch))
    seq += recordCountAt(seq)
  }
  if (store.queuedBytes > 200_000) await new Promise<void>((resolve) => (wake = resolve))
  else await new Promise<void>((resolve) => setImmediate(resolve))
}
