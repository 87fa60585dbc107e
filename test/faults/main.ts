import { randomInt } from 'node:crypto'
import { parseArgs } from 'node:util'
import { errorMessage } from '../../core/errors/index.ts'
import { Random } from '../kit/random.ts'
import { ALL_CELLS, nameOf, rankOf, SHORT_CELLS, tableOf } from './matrix.ts'
import { runCells } from './run-cells.ts'

// The fault matrix as a program: npm run faults -- [--all] [--only TEXT[,TEXT...]] [--seed S] [--list]. Without --all a few cells. The seed chooses the order. Progress on
// stderr; on stdout the matrix with the longest gap of a guest in ms for each cell that held, and one JSON object as its last line. Exit code 0 only if every cell held.
// Ctrl-C ends it behind the cell that runs.

const usage = 'usage: npm run faults -- [--all] [--only TEXT[,TEXT...]] [--seed S] [--list]'

const main = async (): Promise<number> => {
  const { values } = parseArgs({
    options: { all: { type: 'boolean', default: false }, only: { type: 'string' }, seed: { type: 'string', default: String(randomInt(1, 2 ** 31)) }, list: { type: 'boolean', default: false } },
  })
  const seed = Number(values.seed)
  if (!Number.isSafeInteger(seed)) throw new Error(`--seed ${values.seed}: expected a whole number`)
  const random = new Random(seed)
  const wanted = values.only?.split(',') ?? ['']
  const cells = (values.all || values.only !== undefined ? ALL_CELLS : SHORT_CELLS).filter((cell) => wanted.some((text) => nameOf(cell).includes(text)))
  if (cells.length === 0) throw new Error(`no cell has "${values.only}" in its name`)
  if (values.list) {
    process.stdout.write(`${cells.map(nameOf).join('\n')}\n`)
    return 0
  }
  const order = cells.map((cell) => ({ cell, rank: rankOf(cell, random.int(0, 1_000) / 1_000) })).sort((one, other) => one.rank - other.rank)
  process.stderr.write(`seed ${seed}, ${cells.length} cells\n`)
  const enough = new AbortController()
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    process.once(signal, () => {
      process.stderr.write('the cell that runs is the last one\n')
      enough.abort()
    })
  }
  const outcomes = await runCells(order.map(({ cell }) => cell), (line) => void process.stderr.write(`${line}\n`), enough.signal)
  const byName = new Map(outcomes.map((outcome) => [nameOf(outcome.cell), outcome]))
  process.stdout.write(`${tableOf((cell) => {
    const outcome = byName.get(nameOf(cell))
    return outcome === undefined ? '' : outcome.result === undefined ? 'FAILED' : `${outcome.result.longestGapMs} ms`
  })}\n`)
  for (const { cell, problem } of outcomes) if (problem !== undefined) process.stdout.write(`FAILED  ${nameOf(cell)}: ${problem.split('\n')[0]}\n`)
  const failed = outcomes.filter(({ problem }) => problem !== undefined).length
  process.stdout.write(`${JSON.stringify({ ok: failed === 0, cells: outcomes.length, failed, seed, longestGapMs: Math.max(0, ...outcomes.map(({ result }) => result?.longestGapMs ?? 0)) })}\n`)
  return failed === 0 ? 0 : 1
}

try {
  process.exitCode = await main()
} catch (error) {
  process.stderr.write(`${errorMessage(error)}\n${usage}\n`)
  process.exitCode = 2
}
