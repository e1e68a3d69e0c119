"""What a month may cost, and what stops when it has."""

import aws_cdk as cdk
from aws_cdk import aws_budgets as budgets
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.principals import own_service
from models.config import ObserveSettings

EXECUTION_ROLE = "cdk-hnb659fds-cfn-exec-role"  # with which CloudFormation acts, as `cdk bootstrap` names it
# An update or a rollback of what is there stays possible; so does any deletion.
STOPPED = ("application-autoscaling:RegisterScalableTarget", "ecs:CreateService", "sagemaker:CreateEndpoint")


class Budget(Construct):
    """Tell at 80 % of the budget and when the forecast passes it; at 100 % stop what would make new capacity.

    The budget counts the whole account, for an environment has one of its own.
    """

    def __init__(self, scope: Construct, construct_id: str, *, settings: ObserveSettings, name: str) -> None:
        """Make the budget of that name and its action."""
        super().__init__(scope, construct_id)
        stack = cdk.Stack.of(self)
        told = [budgets.CfnBudget.SubscriberProperty(subscription_type="EMAIL", address=settings.email)]

        def notify(kind: str, threshold: int) -> budgets.CfnBudget.NotificationWithSubscribersProperty:
            return budgets.CfnBudget.NotificationWithSubscribersProperty(
                notification=budgets.CfnBudget.NotificationProperty(
                    comparison_operator="GREATER_THAN",
                    notification_type=kind,
                    threshold=threshold,
                    threshold_type="PERCENTAGE",
                ),
                subscribers=told,
            )

        budget = budgets.CfnBudget(
            self,
            "Budget",
            budget=budgets.CfnBudget.BudgetDataProperty(
                budget_name=name,
                budget_type="COST",
                time_unit="MONTHLY",
                budget_limit=budgets.CfnBudget.SpendProperty(amount=settings.budget_usd, unit="USD"),
            ),
            notifications_with_subscribers=[notify("ACTUAL", 80), notify("FORECASTED", 100)],
        )
        role = f"{EXECUTION_ROLE}-{stack.account}-{stack.region}"
        stop = iam.ManagedPolicy(
            self,
            "Stop",
            description="Attached when the budget is spent: no new capacity",
            statements=[
                iam.PolicyStatement(effect=iam.Effect.DENY, actions=list(STOPPED), resources=["*"]),
            ],
        )
        action = budgets.CfnBudgetsAction(
            self,
            "Action",
            budget_name=name,
            action_type="APPLY_IAM_POLICY",
            notification_type="ACTUAL",
            approval_model=settings.budget_stops.upper(),
            action_threshold=budgets.CfnBudgetsAction.ActionThresholdProperty(type="PERCENTAGE", value=100),
            definition=budgets.CfnBudgetsAction.DefinitionProperty(
                iam_action_definition=budgets.CfnBudgetsAction.IamActionDefinitionProperty(
                    policy_arn=stop.managed_policy_arn, roles=[role]
                )
            ),
            execution_role_arn=self._actor(role, stop).role_arn,
            subscribers=[budgets.CfnBudgetsAction.SubscriberProperty(type="EMAIL", address=settings.email)],
        )
        action.add_resource_dependency(budget)

    def _actor(self, role: str, stop: iam.ManagedPolicy) -> iam.Role:
        """Return the role with which the budget attaches that policy to that role, and can do nothing else."""
        stack = cdk.Stack.of(self)
        return iam.Role(
            self,
            "Actor",
            assumed_by=own_service(self, "budgets.amazonaws.com"),
            inline_policies={
                "stop": iam.PolicyDocument(
                    statements=[
                        iam.PolicyStatement(
                            actions=["iam:AttachRolePolicy", "iam:DetachRolePolicy"],
                            resources=[f"arn:aws:iam::{stack.account}:role/{role}"],
                            conditions={"ArnEquals": {"iam:PolicyARN": stop.managed_policy_arn}},
                        )
                    ]
                )
            },
        )
