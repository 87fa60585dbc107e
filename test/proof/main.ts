import { randomInt } from 'node:crypto'
import { parseArgs } from 'node:util'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { runProof, type ProofResult } from './run-proof.ts'
import { sabotage } from './sabotage.ts'

// The write-order proof as a program: npm run proof -- [--checkpoints N] [--seed S] [--disturb] [--sabotage]. Progress on stderr, one JSON object as the last
// line of stdout. Exit code: 0 the proof holds; 1 it does not (always so with --sabotage, which has to be found); 2 it could not be carried out;
// 3 a sabotaged journal was taken for a good one.

const usage = 'usage: npm run proof -- [--checkpoints N] [--seed S] [--writes-per-sec W] [--rpo-limit-ms M] [--nodes 1|2] [--disturb] [--sabotage]'
const SABOTAGE_CHECKPOINTS = 12
const DISTURBANCES = 6

const say = (line: string): void => void process.stderr.write(`${line}\n`)
const answer = (value: object): void => void process.stdout.write(`${JSON.stringify(value)}\n`)

const ending = new AbortController()

const positive = (name: string, text: string): number => {
  const value = Number(text)
  if (!Number.isSafeInteger(value) || value < 1 || value >= 2 ** 31) throw new CdpError('BAD_INPUT', `--${name} ${text}: expected a whole number from 1 on`, { hint: usage })
  return value
}

const nodeCount = (text: string): 1 | 2 => {
  if (text === '1') return 1
  if (text === '2') return 2
  throw new CdpError('BAD_INPUT', `--nodes ${text}: expected 1 or 2`, { hint: usage })
}

const parse = () => {
  try {
    return parseArgs({
      options: {
        checkpoints: { type: 'string' },
        seed: { type: 'string', default: String(randomInt(1, 2 ** 31)) },
        'writes-per-sec': { type: 'string', default: '1000' },
        'rpo-limit-ms': { type: 'string', default: '5000' },
        nodes: { type: 'string', default: '1' },
        disturb: { type: 'boolean', default: false },
        sabotage: { type: 'boolean', default: false },
      },
    }).values
  } catch (cause) {
    throw new CdpError('BAD_INPUT', errorMessage(cause), { cause, hint: usage })
  }
}

const main = async (): Promise<number> => {
  const values = parse()
  const sabotaged = values.sabotage
  const options = {
    checkpoints: positive('checkpoints', values.checkpoints ?? String(sabotaged ? SABOTAGE_CHECKPOINTS : 200)),
    seed: positive('seed', values.seed),
    writesPerSec: positive('writes-per-sec', values['writes-per-sec']),
    rpoLimitMs: positive('rpo-limit-ms', values['rpo-limit-ms']),
    meanPauseMs: 40,
    nodes: nodeCount(values.nodes),
    disturbances: values.disturb ? DISTURBANCES : 0,
    say,
    signal: ending.signal,
  }
  if (!sabotaged) {
    const result = await runProof(options)
    answer(result)
    return result.ok ? 0 : 1
  }
  const found: { violations?: number; control?: number; swapped?: string } = {}
  const before: ProofResult = await runProof(options, async (remains) => void Object.assign(found, await sabotage(remains, say)))
  answer({ ok: false, sabotage: true, checkpoints: before.checkpoints, ...found, seed: before.seed, seconds: before.seconds })
  if (!before.ok || found.control !== 0) return 2
  return (found.violations ?? 0) > 0 ? 1 : 3
}

// A second one ends the process at once.
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => ending.abort())
try {
  process.exitCode = await main()
} catch (error) {
  const badInput = error instanceof CdpError && error.code === 'BAD_INPUT'
  say(Error.isError(error) && !badInput ? (error.stack ?? error.message) : errorMessage(error))
  if (error instanceof CdpError && error.hint !== undefined) say(`hint: ${error.hint}`)
  answer({ ok: false, error: errorMessage(error) })
  process.exitCode = 2
}
