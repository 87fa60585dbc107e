import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { describe, expect, test } from '@jest/globals'
import { processesWith, runTool, type ToolResult } from '../lab/index.ts'
import { projectDir } from '../lab/project.ts'

type Figure = { name: string; value: number; unit: string; reference: number | null; ratio: number | null; reduced?: boolean; note?: string }

const program = `${projectDir()}/dist/bench/main.js`
const bench = (...args: string[]): Promise<ToolResult> => runTool(process.execPath, [program, ...args], { deadlineMs: 240_000, env: { NODE_OPTIONS: '' } })
const figuresOf = ({ stdout, stderr, exitCode }: ToolResult): Figure[] => {
  if (exitCode !== 0) throw new Error(`bench ended with ${exitCode}: ${stderr}`)
  return JSON.parse(stdout) as Figure[]
}
/** What a run of process `pid` has left in the places it uses. */
const leftoversOf = (pid: number): string[] =>
  ['/dev/shm', '/tmp', '/var/tmp', `${projectDir()}/.cache/bench`].flatMap((directory) => readdirSync(directory).filter((name) => name.startsWith(`cdp-bench-${pid}-`)))

describe('npm run bench', () => {
  test('gives the figures asked for as JSON, with their references, and says that they are reduced', async () => {
    const index = figuresOf(await bench('--quick', '--json', '--only', 'index.'))
    expect(index.map(({ name }) => name)).toEqual(['index.open1e6', 'index.bytesPerRecord'])
    const ingest = figuresOf(await bench('--quick', '--json', '--only', 'ingest'))
    expect(ingest.map(({ name }) => name)).toEqual(['ingest', 'ingest.promoting'])
    for (const { value, unit, reduced, note } of [...index, ...ingest]) {
      expect(value).toBeGreaterThan(0)
      expect(unit).toMatch(/^(ms|bytes|MiB\/s)$/)
      expect(reduced).toBe(true)
      expect(note).toEqual(expect.any(String))
    }
    for (const { reference, ratio } of index) expect([reference, ratio]).toEqual([null, null])
    for (const { value, reference, ratio } of ingest) expect(ratio).toBeCloseTo(value / (reference ?? NaN), 5)
  }, 240_000)

  test('measures the whole path with a real agent, and nothing of it is left', async () => {
    const [qd1, ...others] = figuresOf(await bench('--quick', '--json', '--only', 'path.randwrite4k.qd1'))
    expect(others).toEqual([])
    expect(qd1).toMatchObject({ name: 'path.randwrite4k.qd1', unit: 'us', reduced: true, note: expect.not.stringContaining('NOT sustained') })
    expect(qd1.ratio).toBeCloseTo((qd1.reference ?? NaN) / qd1.value, 5)
  }, 240_000)

  test('a name that no figure has is said so, in one line and with a hint', async () => {
    const { exitCode, stderr, stdout } = await bench('--json', '--only', 'nothing')
    expect([exitCode, stdout.trim()]).toEqual([1, '[]'])
    expect(stderr).toContain('no figure begins with "nothing"')
  }, 60_000)

  test('stopped in the middle it takes its processes, images and directories with it', async () => {
    const child = spawn(process.execPath, [program, '--quick', '--only', 'path.randwrite4k.qd32'], { stdio: ['ignore', 'ignore', 'pipe'], env: { ...process.env, NODE_OPTIONS: '' } })
    const pid = child.pid ?? 0
    const ended = once(child, 'exit')
    child.stderr.resume()
    const untilMs = performance.now() + 60_000
    // The load runs: both daemons and the source disk are up.
    while (processesWith(`cdp-bench-${pid}-`).filter(({ commandLine }) => commandLine.startsWith('fio ')).length === 0) {
      if (performance.now() > untilMs) throw new Error('the bench started no load within a minute')
      await once(child.stderr, 'data', { signal: AbortSignal.timeout(100) }).catch(() => undefined)
    }
    child.kill('SIGINT')
    expect(await ended).toEqual([130, null])
    expect(processesWith(`cdp-bench-${pid}-`)).toEqual([])
    expect(leftoversOf(pid)).toEqual([])
  }, 150_000)
})
