// npm run bench [-- --json] [--quick] [--only PREFIX]: each figure beside its reference, measured in the same run (docs/bench.md).
import { mkdtempSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { CdpError, errorMessage } from '../core/errors/index.ts'
import { bootBench } from './boot.ts'
import { captureBench } from './capture.ts'
import type { Bench, Figure } from './figure.ts'
import { idleVmsBench } from './idle-vms.ts'
import { indexBench } from './index-open.ts'
import { ingestBench } from './ingest.ts'
import { pathBench } from './path.ts'
import { pointReadBench } from './point-read.ts'
import { promotionBench } from './promotion.ts'
import { makeDiskDirectory, sweepLeftovers } from './rig/disk-directory.ts'
import { syncBench } from './sync.ts'

const benches: Bench[] = [captureBench, pathBench, syncBench, ingestBench, promotionBench, pointReadBench, bootBench, indexBench, idleVmsBench]
const GIVE_UP_AFTER_MS = 20_000

const { values } = parseArgs({ options: { json: { type: 'boolean', default: false }, quick: { type: 'boolean', default: false }, only: { type: 'string', default: '' } } })
const wants = (name: string): boolean => name.startsWith(values.only)
const say = (line: string): void => void process.stderr.write(`${line}\n`)

const abort = new AbortController()
const giveUp = (signal: NodeJS.Signals): void => {
  if (abort.signal.aborted) return
  say(`bench: ${signal}, tearing down`)
  abort.abort(new CdpError('ABORTED', `the bench was stopped by ${signal}`))
  // Children die with this process; what they had open is removed before.
  setTimeout(() => {
    sweepLeftovers({ own: true })
    process.exit(130)
  }, GIVE_UP_AFTER_MS).unref()
}
process.on('SIGINT', giveUp)
process.on('SIGTERM', giveUp)

sweepLeftovers({ own: false })
const scratchDirectory = mkdtempSync(`/tmp/cdp-bench-${process.pid}-`)
const figures: Figure[] = []
let failed: unknown
try {
  const diskDirectory = makeDiskDirectory()
  for (const bench of benches) {
    abort.signal.throwIfAborted()
    if (!bench.names.some(wants)) continue
    const startedMs = performance.now()
    figures.push(...(await bench.run({ quick: values.quick, wants, say, scratchDirectory, diskDirectory, signal: abort.signal })))
    say(`${bench.names.filter(wants).join(', ')}: ${((performance.now() - startedMs) / 1000).toFixed(0)} s`)
  }
} catch (error) {
  failed = abort.signal.aborted ? abort.signal.reason : error
} finally {
  sweepLeftovers({ own: true })
}

const round = (value: number): string => (value >= 100 ? value.toFixed(0) : value.toPrecision(3))
if (values.json) {
  console.log(JSON.stringify(figures))
} else {
  for (const { name, value, unit, reference, ratio, against, reduced, note } of figures) {
    const beside = reference === null ? '' : `  ${round(reference)} ${unit}`.padEnd(18) + `ratio ${ratio?.toFixed(2)}  (${against})`
    console.log(`${name.padEnd(26)} ${`${round(value)} ${unit}`.padEnd(18)}${beside}${reduced === true ? '  [reduced]' : ''}${note === undefined ? '' : `  ${note}`}`)
  }
}
if (failed !== undefined) say(`bench: ${errorMessage(failed)}${failed instanceof CdpError && failed.hint !== undefined ? `\nhint: ${failed.hint}` : ''}`)
else if (figures.length === 0) say(`bench: no figure begins with "${values.only}"\nhint: see docs/bench.md for their names`)
process.exit(abort.signal.aborted ? 130 : failed !== undefined || figures.length === 0 ? 1 : 0)
