import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { tool } from '../test/lab/index.ts'
import { figureOf, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { AgentSide } from './rig/agent-side.ts'
import { fio } from './rig/fio.ts'
import { Nbdkit } from './rig/nbdkit.ts'
import { PluginSide, vpgOf } from './rig/plugin-side.ts'
import { SourceDisk } from './rig/source-disk.ts'

const NAME = 'point.read'
const MIB = 2 ** 20
const VM = '500'
/** The history is what matters here, not whether its writing is sustained. */
const BUDGET_BYTES = 1024 * MIB
/** Share of the disk that was written again, 4 KiB at a time anywhere, after the sync. */
const REWRITTEN_SHARE = 0.1
/** Reading in turn, as a boot or a copy does: 1 MiB a request, four under way. */
const COPY_ARGS = ['--request-size=1048576', '--requests=4', '--connections=1']

/** A recovery point read from end to end through the agent's export, against the mirror file read the same way from nbdkit. */
const run = async ({ quick, say, scratchDirectory: socketDirectory, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const sizeBytes = (quick ? 256 : 1024) * MIB
  await using stack = new AsyncDisposableStack()
  stack.defer(() => rm(join(diskDirectory, 'point'), { recursive: true, force: true }))
  const source = stack.use(await SourceDisk.start(socketDirectory, 'point', sizeBytes, { filled: true }))
  const agent = stack.use(await AgentSide.start({ socketDirectory, diskDirectory: join(diskDirectory, 'point') }))
  const plugin = stack.use(await PluginSide.start())
  const targetPath = join(socketDirectory, `${VM}.sock`)
  await plugin.capture({ vm: VM, targetPath, sizeBytes, budgetBytes: BUDGET_BYTES, pairing: agent.pairing }, { copy: true })
  await plugin.copy(VM, source.nbdPath, sizeBytes)
  const read = async (uri: string): Promise<number> => {
    const startedMs = performance.now()
    await tool('nbdcopy', [...COPY_ARGS, uri, 'null:'], { deadlineMs: 300_000, signal })
    return sizeBytes / MIB / ((performance.now() - startedMs) / 1000)
  }
  // One connection for both checkpoints: behind one that has ended, capture is not in step any more.
  const [plain, rewritten] = await source.mirrored({ socketPath: targetPath, exportName: 'scsi0' }, async () => {
    const before = await plugin.checkpoint(VM)
    await fio(source.uri, { rw: 'randwrite', blockBytes: 4096, depth: 16, seconds: 60, sizeBytes: Math.floor(sizeBytes * REWRITTEN_SHARE) }, { signal })
    return [before, await plugin.checkpoint(VM)]
  })
  const uriOf = async (checkpoint: string): Promise<string> => (await agent.openPoint(vpgOf(VM), checkpoint)).disks[0].uri
  const plainRate = await read(await uriOf(plain))
  const uri = await uriOf(rewritten)
  await agent.untilIdle()
  await using mirror = await Nbdkit.start(socketDirectory, '-r', 'file', join(agent.vmDirectory(VM), 'mirror/0.raw'))
  const rounds: { ours: number; reference: number }[] = []
  for (let round = 0; round < (quick ? 1 : 5); round++) {
    const reference = await read(`nbd+unix:///?socket=${mirror.socketPath}`)
    const ours = await read(uri)
    rounds.push({ ours, reference })
    say(`${NAME} round ${round}: ours ${ours.toFixed(0)} MiB/s, the mirror file ${reference.toFixed(0)}`)
  }
  await plugin.release(VM)
  return [{
    ...figureOf(NAME, 'MiB/s', 'more is better', rounds, 'the mirror file from nbdkit file'), ...(quick ? { reduced: true } : {}),
    note: `${sizeBytes / MIB} MiB, a tenth of it 4 KiB writes in the journal; without them ${plainRate.toFixed(0)} MiB/s`,
  }]
}

export const pointReadBench: Bench = { names: [NAME], run }
