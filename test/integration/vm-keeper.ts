// A plugin that protects one VM and can be killed: a process of its own around ProtectedVm. Options come as JSON in the first argument, commands as
// JSON lines on stdin ({suspend: HoldRequest} or {resume: owner}, answered by {answer}), states go out as JSON lines on stdout.
import { createInterface } from 'node:readline'
import { errorMessage } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import { GroupClock } from '../../plugin/capture/index.ts'
import { GroupFence } from '../../plugin/protect/group-fence.ts'
import { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import type { ProtectedVmOptions } from '../../plugin/protect/protect-settings.ts'
import type { HoldRequest } from '../../plugin/protect/suspension.ts'

const tell = (value: unknown): void => void process.stdout.write(`${JSON.stringify(value)}\n`)
const options = JSON.parse(process.argv[2]) as Omit<ProtectedVmOptions, 'onChange' | 'onNews' | 'groupClock' | 'log' | 'fence'>
const fence = new GroupFence({ stateDirectory: options.settings.stateDirectory, vpg: options.vpg, log: silentLogger, nowUnixMs: Date.now })
let rounds = 0
const roundMark = (): CheckpointMark => ({ id: `k${process.pid}-${++rounds}`, vpg: options.vpg, vms: options.vms, atUnixMs: Date.now(), kind: 'automatic' })
const vm = new ProtectedVm({ ...options, groupClock: new GroupClock().buffer, fence, log: silentLogger, onNews: () => undefined, roundMark, onChange: (_id, state) => tell({ state }) })
const obey = async (line: string): Promise<unknown> => {
  const command = JSON.parse(line) as { suspend?: HoldRequest; resume?: string }
  return command.suspend === undefined ? vm.resume(command.resume ?? '') : vm.suspend(command.suspend)
}
const commands = createInterface({ input: process.stdin })
// Whoever started it is gone.
commands.on('close', () => process.exit(0))
commands.on('line', (line) => {
  obey(line).then((answer) => tell({ answer }), (error: unknown) => tell({ answer: errorMessage(error) }))
})
vm.start()
