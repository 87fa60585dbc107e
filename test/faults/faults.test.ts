import { beforeAll, expect, test } from '@jest/globals'
import { testSeed } from '../kit/random.ts'
import { runTool, tool } from '../lab/index.ts'
import { projectDir } from '../lab/project.ts'
import { ALL_CELLS, SHORT_CELLS } from './matrix.ts'

const ALL = process.env.CDP_ALL !== undefined
const CELLS = ALL ? ALL_CELLS.length : SHORT_CELLS.length
const DEADLINE_MS = 300_000 + CELLS * 180_000
const OUTAGE_SECONDS = ALL ? 60 : 10

beforeAll(async () => {
  await tool(process.execPath, ['scripts/build.mjs'], { cwd: projectDir(), deadlineMs: 120_000 })
}, 120_000)

/** A program of this folder, without the build: its exit code and the object on its last line. */
const run = async (program: string, args: string[], deadlineMs: number) => {
  const { exitCode, stdout, stderr } = await runTool(process.execPath, [`dist/test/faults/${program}.js`, ...args], { cwd: projectDir(), deadlineMs, env: { NODE_OPTIONS: '' } })
  console.log(`${program} ${args.join(' ')}: exit code ${exitCode}\n${stdout}${exitCode === 0 ? '' : stderr.slice(-12_000)}`)
  return { exitCode, answer: JSON.parse(stdout.trimEnd().split('\n').at(-1) ?? '') as Record<string, unknown> }
}

test(`${CELLS} cells of the fault matrix hold`, async () => {
  const seed = testSeed()
  const { exitCode, answer } = await run('main', [...(ALL ? ['--all'] : []), '--seed', String(seed)], DEADLINE_MS)
  expect(answer).toMatchObject({ ok: true, cells: CELLS, failed: 0, seed })
  expect(exitCode).toBe(0)
}, DEADLINE_MS + 10_000)

test(`an outage of ${OUTAGE_SECONDS} s under load costs no checkpoint, and samples of those cut meanwhile recover bit by bit`, async () => {
  const { exitCode, answer } = await run('outage', ['--seconds', String(OUTAGE_SECONDS), '--rate', ALL ? '50' : '20', '--seed', String(testSeed())], 300_000 + OUTAGE_SECONDS * 15_000)
  expect(answer).toMatchObject({ ok: true, samples: 4, exact: 4 })
  expect(answer.checkpoints).toBe(answer.valid)
  expect(exitCode).toBe(0)
}, 310_000 + OUTAGE_SECONDS * 15_000)
