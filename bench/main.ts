// npm run bench [-- --json] [--quick] [--only PREFIX]: each figure beside its reference, measured in the same run.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { captureBench } from './capture.ts'
import type { Bench, Figure } from './figure.ts'

const benches: Bench[] = [captureBench]

const { values } = parseArgs({ options: { json: { type: 'boolean', default: false }, quick: { type: 'boolean', default: false }, only: { type: 'string', default: '' } } })
const wants = (name: string): boolean => name.startsWith(values.only)
const say = (line: string): void => void process.stderr.write(`${line}\n`)
const scratchDirectory = mkdtempSync(join(tmpdir(), 'cdp-bench-'))
const figures: Figure[] = []
try {
  for (const bench of benches) {
    if (bench.names.some(wants)) figures.push(...(await bench.run({ quick: values.quick, wants, say, scratchDirectory })))
  }
} finally {
  rmSync(scratchDirectory, { recursive: true, force: true })
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
process.exit(figures.length > 0 ? 0 : 1)
