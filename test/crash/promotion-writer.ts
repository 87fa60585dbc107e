import { writeSync } from 'node:fs'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { silentLogger } from '../../core/log/index.ts'

// Child of promotion-kill.test.ts: opens the store in argv[2], promotes it to argv[3] (or to what it was going to); argv[4]: its VM; and trims, telling each
// batch as a line on stdout, until it is killed or done.
const [, , directory, wanted, vm = 'kill'] = process.argv
const sealer = new SegmentSealer()
const store = await VmStore.open({ directory, vm, log: silentLogger, clock: { nowUnixMs: Date.now }, sealer, limits: { segmentRecords: 50 } })
const target = store.base.promotingToSeq ?? Number(wanted)
writeSync(1, `from ${store.baseSeq}\n`)
await store.base.promote(target, { batchBytes: 30_000, pace: async () => void writeSync(1, 'batch\n') })
writeSync(1, 'promoted\n')
await store.base.trim()
writeSync(1, 'trimmed\n')
await store[Symbol.asyncDispose]()
await sealer[Symbol.asyncDispose]()
process.exit(0)
