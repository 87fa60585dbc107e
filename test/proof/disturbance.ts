import type { Random } from '../kit/random.ts'
import { withDeadline, type LabVm } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import type { Load } from './load.ts'
import { VPG, type Rig } from './rig.ts'

export type Disturbance = 'agent killed' | 'plugin killed' | 'agent stopped for a second'

const KINDS: readonly Disturbance[] = ['agent killed', 'plugin killed', 'agent stopped for a second']
const STOPPED_MS = 1000
const TAKEN_AWAY_MS = 30_000

/**
 * Does to the daemons what a bad day does, under load, and waits until the group is protected again: kill -9 of the agent (the stream reconnects and goes on)
 * or of the plugin (a new attach and a bitmap sync), or an agent that says nothing for a while. `nth` counts them, so that all kinds come.
 */
export const disturb = async ({ sites, vms }: Rig, load: Load, nth: number, random: Random): Promise<Disturbance> => {
  const kind = KINDS[nth % KINDS.length]
  switch (kind) {
    case 'agent killed':
      await sites.agent.kill()
      await sites.agent.start()
      break
    case 'plugin killed':
      await sites.plugin.kill()
      // Writers that come through QEMU's NBD server stay above a dead job when the plugin has put the device back below it, and QEMU 10.0 damages its
      // memory when such a job is cut off under writes (docs/decisions/ending-a-mirror.md). A guest's own writes cannot be there: test/integration/target-death.
      await load.whileQuiet(async () => {
        const jobsEnded = Promise.all(vms.map(untilJobsEnd))
        await sites.plugin.start()
        await withDeadline(jobsEnded, TAKEN_AWAY_MS, 'what the dead plugin left in QEMU is taken away')
      })
      break
    case 'agent stopped for a second':
      sites.agent.signal('SIGSTOP')
      await new Promise((resolve) => setTimeout(resolve, random.int(1, STOPPED_MS)))
      sites.agent.signal('SIGCONT')
      break
  }
  const overAtUnixMs = Date.now()
  await until(`${VPG} has a checkpoint that was cut after "${kind}"`, 60_000, async () => {
    const status = (await sites.pluginStatus()).vpgs.find(({ name }) => name === VPG)
    return status?.state === 'protected' && (status.lastCheckpoint?.atUnixMs ?? 0) > overAtUnixMs ? true : undefined
  }, async () => JSON.stringify(await sites.pluginStatus()))
  return kind
}

/** All block jobs that there are when it is called. */
const untilJobsEnd = async ({ monitor }: LabVm): Promise<void> => {
  const ended = new Set<unknown>()
  const { promise, resolve } = Promise.withResolvers<void>()
  let jobs: readonly string[] | undefined
  const look = (): void => {
    if (jobs?.every((id) => ended.has(id))) resolve()
  }
  const stopListening = monitor.onEvent(({ name, data }) => {
    if (name !== 'JOB_STATUS_CHANGE' || data['status'] !== 'null') return
    ended.add(data['id'])
    look()
  })
  try {
    jobs = ((await monitor.run('query-jobs')) as { id: string }[]).map(({ id }) => id)
    look()
    await promise
  } finally {
    stopListening()
  }
}
