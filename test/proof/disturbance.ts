import type { Random } from '../kit/random.ts'
import { until, type Sites } from '../lab/sites.ts'
import { VPG } from './rig.ts'

export type Disturbance = 'agent killed' | 'plugin killed' | 'agent stopped for a second'

const KINDS: readonly Disturbance[] = ['agent killed', 'plugin killed', 'agent stopped for a second']
const STOPPED_MS = 1000

/**
 * Does to the daemons what a bad day does, under load, and waits until the group is protected again: kill -9 of the agent (the stream reconnects and goes on)
 * or of the plugin (a new attach and a bitmap sync), or an agent that says nothing for a while. `nth` counts them, so that all kinds come.
 */
export const disturb = async (sites: Sites, nth: number, random: Random): Promise<Disturbance> => {
  const kind = KINDS[nth % KINDS.length]
  switch (kind) {
    case 'agent killed':
      await sites.agent.kill()
      await sites.agent.start()
      break
    case 'plugin killed':
      await sites.plugin.kill()
      await sites.plugin.start()
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
